"""Trackers: where the numbers of a run are shown. A tracker that fails never ends a run."""
