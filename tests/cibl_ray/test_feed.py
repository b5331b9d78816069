"""Images on their way from the loader's buffers to the network."""

import pytest
import torch

from cibl_ray.config import load_config
from cibl_ray.training.feed import Feed
from pipelines.augment.recipe import Normalize
from pipelines.loaders.reading import Batch, train_plan

SAMPLES, BATCHES = 64, 6


class OneBuffer:
    """Every batch in the same memory, page-locked as FFCV's is where there is a GPU; batch n is of the value n."""

    name, lasting, samples, batches = "one buffer", False, SAMPLES * BATCHES, BATCHES

    def __init__(self, device, size):
        self.views = torch.empty((SAMPLES, 2, size, size, 3), dtype=torch.uint8, pin_memory=device.type == "cuda")

    def epoch(self, epoch, start=0):
        for number in range(start, BATCHES):
            self.views.fill_(number)
            yield Batch(self.views, torch.full((SAMPLES,), number), torch.arange(SAMPLES))

    def close(self):
        pass


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])
def test_a_loader_may_fill_its_buffer_anew_while_steps_wait(name):
    """The GPU is still busy with earlier steps when the loader writes its next batch."""
    device, config = torch.device(name), load_config("quickstart", [])
    normalize = Normalize(config.data).to(device)
    plan = train_plan(config.data, SAMPLES, 0)
    feed = Feed(OneBuffer(device, plan.size), plan, normalize, device, slice(0, SAMPLES), SAMPLES)
    list(feed.steps(0, 0))  # loads every kernel
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda._sleep(10**9)  # about half a second
    seen = list(feed.steps(0, 0))
    assert device.type == "cpu" or not torch.cuda.current_stream().query()  # it is still busy
    assert len(seen) == BATCHES
    for number, images in enumerate(seen):
        expected = normalize(torch.full((SAMPLES, 2, plan.size, plan.size, 3), number, dtype=torch.uint8, device=device))
        assert torch.equal(images.pixels, expected)
        assert (images.labels == number).all()
