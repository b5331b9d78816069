"""The page that shows a model and tries it: plain HTML, CSS and JavaScript in `static/`, and their routes."""
