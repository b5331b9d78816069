"""The optimizer is torch's, and a run does without torch's compiler."""

import subprocess
import sys

import pytest
import torch

from cibl_ray.training.optimizer import Sgd
from tests.conftest import REPOSITORY


@pytest.mark.parametrize("nesterov", [False, True])
def test_steps_are_torchs_to_the_bit(nesterov):
    weights = []
    for kind in (Sgd, torch.optim.SGD):
        torch.manual_seed(0)
        layer = torch.nn.Linear(5, 3)
        groups = [{"params": [layer.weight], "weight_decay": 0.1}, {"params": [layer.bias], "weight_decay": 0.0}]
        optimizer = kind(groups, lr=0.1, momentum=0.9, nesterov=nesterov)
        for step in range(4):
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            optimizer.zero_grad(set_to_none=True)
            layer(torch.randn(7, 5)).square().sum().backward()
            optimizer.step()
        assert all("momentum_buffer" in optimizer.state[parameter] for parameter in layer.parameters())
        weights.append([parameter.detach().clone() for parameter in layer.parameters()])
        assert all(parameter.requires_grad and parameter.grad is not None for parameter in layer.parameters())
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*weights, strict=True))


def test_a_run_does_not_import_the_compiler(tmp_path):
    code = """
import sys
from cibl_ray.train import main
sys.argv = ["train", "quickstart", "--epochs", "1", "--warmup_epochs", "0", "--batch_size", "62", "--loader.kind", "torch",
            "--runs", sys.argv[1] + "/runs", "--prepared", sys.argv[1] + "/prepared", "--name", "light"]
main()
print([name for name in ("torch._dynamo", "torchvision", "sklearn") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
