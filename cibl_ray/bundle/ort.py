"""The one place that imports onnxruntime: `from cibl_ray.bundle.ort import onnxruntime`.

From release 1.29 on, onnxruntime's builds for Linux send telemetry by default: they write a device id and a database to the
user's cache and contact the vendor. The variable that turns this off is read when onnxruntime is imported, so it is set here,
before. Whoever wants telemetry sets ORT_DISABLE_TELEMETRY=0.
"""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime

__all__ = ["onnxruntime"]
