"""The documentation site: what mkdocs.yml calls while it builds, and the tables of the docs."""
