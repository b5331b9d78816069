"""Every method's loss as a `torch.nn.Module`, for a plain loop, Lightning, timm or accelerate.

A module takes logits (M, C), embeddings (M, d) and labels (M,), or those of them that its method uses, and returns a scalar in
float32 (float64 for float64 inputs). The M rows are all views of all images of a step, in any order.

All modules share these rules:

- Labels are of any integer type, from 0 to C-1. Logits and embeddings are floats of any precision; under autocast the loss
  itself is computed in float32.
- Embeddings are normalised to unit norm. With `normalized=True` they must have it already.
- Wrong shapes, types, labels, settings and values that are not finite raise ValueError, in one line. Checking values waits for
  the device once a step; `validate=False` leaves it out.
- A batch without rows has the loss 0. A class whose count is 0 counts as one image.
- With `gather=True` the embeddings are contrasted with those of all processes of the default process group, with exact
  gradients. DistributedDataParallel's average is then the gradient of the mean over all rows of all processes.
"""
