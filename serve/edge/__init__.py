"""The edge: a downloaded model alone, with numpy, Pillow and onnxruntime."""
