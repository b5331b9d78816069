"""The edge: a downloaded model alone, with numpy, Pillow and onnxruntime.

from serve.edge import Model

model = Model("http://127.0.0.1:8000")  # or a bundle's folder, or an .onnx file
for answer in model.predict(["ship.jpg", array, image]):
    print(answer.label, answer.probability)
"""

from serve.edge.api import Answer, Model

__all__ = ["Answer", "Model"]
