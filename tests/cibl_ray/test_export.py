"""The bundle says what it is, its files compute what torch computes, and a failed verification leaves nothing."""

import importlib.metadata
import io
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from cibl_ray import export
from cibl_ray.bundle import targets
from cibl_ray.bundle.card import FILES, METADATA, file_sha256, open_bundle, read_card
from cibl_ray.bundle.ort import onnxruntime
from cibl_ray.bundle.runtime import Runtime
from cibl_ray.evaluation.evaluate import evaluate
from cibl_ray.exporting import make_bundle as module
from cibl_ray.exporting.make_bundle import Options, make_bundle
from cibl_ray.exporting.report import write_model_card
from cibl_ray.networks.backbones.config import ResNet20Backbone
from cibl_ray.networks.backbones.input_rule import Origin
from cibl_ray.run.checkpoint import load_checkpoint
from pipelines.augment.recipe import Normalize
from pipelines.common.errors import UserError
from pipelines.config import LoaderConfig
from pipelines.loaders.make import make_loader
from pipelines.loaders.reading import eval_plan
from pipelines.prepare.build import ensure_prepared
from tests.conftest import REPOSITORY
from tests.exported import small_run


def split_images(run_folder, count=40):
    checkpoint = load_checkpoint(run_folder / "checkpoints" / "best.safetensors")
    data = checkpoint.config.data
    prepared = ensure_prepared(data, checkpoint.config.seed)
    loader = make_loader(prepared, "test", eval_plan(data, count), LoaderConfig())
    return next(iter(loader.epoch(0))).views[:, 0].numpy().copy(), checkpoint


def torch_logits(checkpoint, images) -> np.ndarray:
    normalize = Normalize(checkpoint.config.data)
    with torch.inference_mode():
        return checkpoint.network().eval().classify(normalize(torch.from_numpy(images)[:, None])).numpy()


def test_bundle_says_what_it_is(bundle, run_folder):
    opened = open_bundle(bundle)
    checkpoint = load_checkpoint(run_folder / "checkpoints" / "best.safetensors")
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert {path.name for path in bundle.iterdir()} == {
        "manifest.json", "model.onnx", "model.fp16.onnx", "model.int8.onnx", "README.md", "class_counts.png", "tail_shift.png",
    }  # fmt: skip
    assert opened.card.classes == checkpoint.classes
    assert opened.card.train_counts == checkpoint.train_counts.tolist()
    assert opened.card.groups == ["many" if n > 100 else "few" if n < 20 else "medium" for n in opened.card.train_counts]
    assert manifest["source"]["run"] == "digits"
    assert manifest["source"]["checkpoint_sha256"] == file_sha256(run_folder / "checkpoints" / "best.safetensors")
    assert manifest["files"] == {path.name: file_sha256(path) for path in bundle.iterdir() if path.name != "manifest.json"}
    for precision, file in FILES.items():
        session = onnxruntime.InferenceSession(bundle / file, providers=["CPUExecutionProvider"])
        card = read_card(session.get_modelmeta().custom_metadata_map[METADATA], file)
        assert card.precision == precision
        assert (card.classes, card.rule, card.accuracy) == (opened.card.classes, opened.card.rule, opened.card.accuracy)
        assert [entry.name for entry in session.get_inputs()] == ["images"]
        assert session.get_overridable_initializers() == []
        outputs = {entry.name: entry.shape for entry in session.get_outputs()}
        assert [*outputs] == ["logits", "probabilities", "log_prior", "embedding"]
        assert {shape[0] for shape in outputs.values()} == {"batch"}


def test_accuracy_is_that_of_the_evaluation(bundle, run_folder):
    measured = open_bundle(bundle).card.accuracy["fp32"]
    scores = evaluate(load_checkpoint(run_folder / "checkpoints" / "best.safetensors")).scores
    for name in ("overall", "many", "medium", "few", "worst"):
        assert measured[name] == pytest.approx(getattr(scores, name), abs=0.006), name  # a tie of two classes at most
    assert measured["samples"] == scores.samples
    assert measured["split"] == "test"


@pytest.mark.parametrize("size", [1, 2, 17, 40])
def test_any_batch_gives_torchs_logits(bundle, run_folder, size):
    images, checkpoint = split_images(run_folder)
    logits, probabilities = Runtime(bundle / "model.onnx", "cpu")(images[:size])
    expected = torch_logits(checkpoint, images[:size])
    assert np.abs(logits - expected).max() < 1e-4
    assert np.abs(probabilities - torch.from_numpy(expected).softmax(1).numpy()).max() < 1e-5


def test_tail_shift_is_optional_and_of_each_image(bundle, run_folder):
    images, checkpoint = split_images(run_folder)
    runtime = Runtime(bundle / "model.onnx", "cpu")
    (plain,) = runtime(images, outputs=("logits",))
    log_prior = np.log(checkpoint.train_counts / checkpoint.train_counts.sum())
    shifts = np.linspace(-1, 2, len(images)).astype(np.float32)
    (of_each,) = runtime(images, shifts, ("logits",))
    assert np.abs(of_each - (plain - shifts[:, None] * log_prior)).max() < 1e-4
    probabilities, of_all = runtime(images, np.array([1.5], np.float32), ("probabilities", "logits"))
    assert np.abs(of_all - (plain - 1.5 * log_prior)).max() < 1e-4
    assert np.abs(probabilities - torch.from_numpy(of_all).softmax(1).numpy()).max() < 1e-6
    (given,) = runtime(images[:3], outputs=("log_prior",))
    assert np.abs(given - log_prior).max() < 1e-6
    assert given.shape == (3, 10)


def test_onnxruntime_loads_it_without_a_warning(bundle):
    program = f"from cibl_ray.bundle.ort import onnxruntime as o; o.InferenceSession({str(bundle / 'model.onnx')!r})"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize("size", [1, 7])
def test_opencv_runs_it_and_shifts(bundle, run_folder, size):
    cv2 = pytest.importorskip("cv2")
    if int(cv2.__version__.split(".")[0]) < 5:
        pytest.skip("OpenCV before 5 does not read these graphs")
    images, _ = split_images(run_folder)
    network = cv2.dnn.readNetFromONNX(str(bundle / "model.onnx"))
    network.setInput(images[:size], "images")
    names = network.getUnconnectedOutLayersNames()
    outputs = dict(zip(names, network.forward(names), strict=True))
    (expected,) = Runtime(bundle / "model.onnx", "cpu")(images[:size], np.array([0.75], np.float32), ("logits",))
    assert np.abs(outputs["logits"] - 0.75 * outputs["log_prior"] - expected).max() < 1e-3


def test_openvino_runs_it_and_shifts(bundle, run_folder):
    openvino = pytest.importorskip("openvino")
    images, _ = split_images(run_folder)
    model = openvino.Core().compile_model(bundle / "model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = model({"images": images})
    (expected,) = Runtime(bundle / "model.onnx", "cpu")(images, np.array([0.75], np.float32), ("logits",))
    assert np.abs(found["logits"] - 0.75 * found["log_prior"] - expected).max() < 1e-3


def test_embedding_has_unit_norm_and_torchs_direction(bundle, run_folder):
    images, checkpoint = split_images(run_folder)
    (embedding,) = Runtime(bundle / "model.onnx", "cpu")(images, outputs=("embedding",))
    with torch.inference_mode():
        expected = checkpoint.network().eval()(Normalize(checkpoint.config.data)(torch.from_numpy(images)[:, None])).embeddings
    assert np.abs(embedding - expected.numpy()).max() < 1e-4
    assert np.abs(np.linalg.norm(embedding, axis=1) - 1).max() < 1e-5


def test_int8_is_quantised_and_close(bundle, run_folder):
    images, _ = split_images(run_folder)
    kinds = {node.op_type for node in onnx.load(bundle / "model.int8.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    assert (bundle / "model.int8.onnx").stat().st_size < 0.6 * (bundle / "model.onnx").stat().st_size
    fp32, int8 = (Runtime(bundle / FILES[name], "cpu")(images, outputs=("logits",))[0] for name in ("fp32", "int8"))
    assert (fp32.argmax(1) == int8.argmax(1)).mean() > 0.8


def test_int8_that_loses_too_much_keeps_depthwise_convolutions_in_float32(tmp_path, monkeypatch, caplog):
    """A network of depthwise and plain convolutions: the first int8 is refused, the second one is the bundle's."""
    run = small_run(
        tmp_path, "--network.backbone", "{kind: timm, name: test_efficientnet, weights: none}", "--epochs", "1",
        "--warmup_epochs", "0", "--loss", "{kind: cross_entropy}",
    )  # fmt: skip
    losses = ["few falls from 97.78 % to 95.56 % on the test images", "", ""]
    monkeypatch.setattr(module._Export, "_loss", lambda self, scores, precision: losses.pop(0) if precision == "int8" else "")
    options = Options(precisions=("fp32", "int8"), calibration=20, provider="cpu")
    made = make_bundle(run / "checkpoints" / "last.safetensors", tmp_path / "out", options)
    assert losses == [""]  # once when the first int8 was measured, once for the second
    graph = onnx.load(made.folder / "model.int8.onnx").graph
    weights = {entry.name for entry in graph.initializer}
    of = {node.name: node for node in graph.node if node.op_type == "Conv"}
    groups = {name: next((entry.i for entry in node.attribute if entry.name == "group"), 1) for name, node in of.items()}
    kept = {name for name, count in groups.items() if count > 1}
    assert kept
    for name, node in of.items():  # quantised weights come out of a DequantizeLinear
        assert (node.input[1] in weights) == (name in kept), name
    card = open_bundle(made.folder).card
    layers = card.source["int8"]["float_layers"]
    assert sorted(layers["convolutions"]) == sorted(kept)
    assert len(layers["linear"]) == 1  # the head
    assert any(f"its {len(kept)} depthwise convolutions stay in float32" in line for line in caplog.messages)
    said = f"stay in float32: 1 linear layer and {len(kept)} depthwise convolutions (with them in int8 a group lost too much)."
    assert said in (made.folder / "README.md").read_text()


def test_int8_of_linear_layers_says_that_they_stay_in_float32(tmp_path, caplog):
    """Of a transformer they are nearly all weights, and the file is nearly that of float32."""
    run = small_run(
        tmp_path, "--network.backbone", "{kind: module, path: tests.exported.mostly_linear}", "--epochs", "1",
        "--warmup_epochs", "0", "--loss", "{kind: cross_entropy}",
    )  # fmt: skip
    options = Options(precisions=("fp32", "int8"), calibration=20, max_drop=100, provider="cpu")
    made = make_bundle(run / "checkpoints" / "last.safetensors", tmp_path / "out", options)
    of_int8 = open_bundle(made.folder).card.source["int8"]
    linear, convolution = 3 * 48 * 48 + 48 * 10, 48 * 3 * 4 * 4
    assert of_int8["float_share"] == pytest.approx(linear / (linear + convolution), abs=1e-4)  # 76 %
    assert (len(of_int8["float_layers"]["linear"]), of_int8["float_layers"]["convolutions"]) == (4, [])
    told = "int8: 76 % of the weights stay in float32, because linear layers are not converted; fp16 makes a smaller file"
    assert caplog.messages.count(told) == 1
    assert "76 % of the weights stay in float32: 4 linear layers." in (made.folder / "README.md").read_text()


def test_the_card_says_what_int8_leaves_in_float32(bundle):
    """A convolutional network: the head, and the two layers of the embedding."""
    of_int8 = open_bundle(bundle).card.source["int8"]
    linear, convolutions = 10 * 64 + 512 * 64 + 128 * 512, 267_696  # of ResNet-20
    assert of_int8["float_share"] == pytest.approx(linear / (linear + convolutions), abs=1e-4)
    assert (len(of_int8["float_layers"]["linear"]), of_int8["float_layers"]["convolutions"]) == (3, [])
    assert "27 % of the weights stay in float32: 3 linear layers." in (bundle / "README.md").read_text()


@pytest.mark.parametrize(
    ("machine", "flags", "here", "overflow"),
    [
        ("x86_64", "avx2", "x86-avx2", {"x86", "arm"}),
        ("x86_64", "avx2 avx_vnni", "x86", set()),
        ("x86_64", "avx512_vnni", "x86", set()),
        ("AMD64", "", "x86-avx2", set()),  # Windows does not say
        ("aarch64", "asimd", "arm", set()),
    ],
)
def test_int8_that_overflows_on_a_cpu_is_told(machine, flags, here, overflow, bundle, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(targets, "cpu_info", lambda: flags)
    assert targets.this_machine() == here
    for target in ("x86", "x86-avx2", "arm"):
        model = onnx.load(bundle / "model.int8.onnx")
        (entry,) = (entry for entry in model.metadata_props if entry.key == METADATA)
        card = json.loads(entry.value)
        entry.value = json.dumps({**card, "source": {**card["source"], "int8": {"target": target}}})
        onnx.save(model, tmp_path / "model.onnx")
        caplog.clear()
        Runtime(tmp_path / "model.onnx", "cpu")
        assert [f"'{tmp_path / 'model.onnx'}' is for {target}; this CPU lacks VNNI" in line for line in caplog.messages] == (
            [True] if target in overflow else []
        )
    assert targets.misfit({}) is targets.misfit({"int8": None}) is None
    Runtime(bundle / "model.onnx", "cpu")


def test_cosine_head_and_other_losses_export(tmp_path):
    run = small_run(tmp_path, "--loss.kind", "cross_entropy", "--network.head.kind", "cosine", "--epochs", "1")
    make_bundle(run / "checkpoints" / "last.safetensors", tmp_path / "out", Options(provider="cpu", embedding=True))
    assert open_bundle(tmp_path / "out").card.source["epoch"] == 1


def test_originals_that_the_service_does_not_take_are_told(run_folder, tmp_path, monkeypatch, caplog):
    from pipelines.prepare import originals

    true = originals.original_images

    def others(*arguments):
        for number, (data, place) in enumerate(true(*arguments)):
            file = io.BytesIO()
            Image.open(io.BytesIO(data)).save(file, ("BMP", "TIFF", "PNG")[min(number, 2)])
            yield file.getvalue(), place

    monkeypatch.setattr(module, "original_images", others)
    make_bundle(run_folder / "checkpoints" / "best.safetensors", tmp_path / "out", Options(provider="cpu"))
    assert "2 of them are BMP, TIFF: the service takes JPEG, PNG, WEBP, and what --formats adds" in caplog.messages
    assert open_bundle(tmp_path / "out").models


@pytest.mark.parametrize("fault", ["logits", "pixels", "int8"])
def test_a_failed_verification_leaves_no_bundle(run_folder, tmp_path, monkeypatch, fault):
    options = Options(provider="cpu")
    if fault == "logits":
        true = Runtime.__call__
        monkeypatch.setattr(Runtime, "__call__", lambda *a, **k: [part + 0.01 for part in true(*a, **k)])
        message = r"at batch 1 the logits of onnxruntime \(CPUExecutionProvider\) are 0.01 from torch's"
    elif fault == "pixels":
        from pipelines.pixels import EvalRule

        true_rule, calls = EvalRule.__call__, []

        def other(rule, image):
            calls.append(image)
            return true_rule(rule, image) ^ 1

        # the server's way alone: digits lie as they are needed, so that the evaluation copies them
        monkeypatch.setattr(EvalRule, "__call__", other)
        message = "the server's pixels differ from those evaluated, by 1 at most"
    else:
        options = Options(precisions=("fp32", "int8"), calibration=10, max_drop=0.5, provider="cpu")
        true_compare = module._Export._compare

        def worse(self, scores):
            from dataclasses import replace

            true_compare(self, {**scores, "int8": replace(scores["fp32"], many=scores["fp32"].many - 0.007)})

        monkeypatch.setattr(module._Export, "_compare", worse)
        message = r"int8 refused: many falls from .* more than 0.5 points"
    with pytest.raises(UserError, match=message):
        make_bundle(run_folder / "checkpoints" / "best.safetensors", tmp_path / "out", options)
    assert list(tmp_path.iterdir()) == []


def test_the_card_names_pretrained_weights_and_their_licence(run_folder, bundle, tmp_path, monkeypatch):
    origin = {"network": "small", "weights": "hf-hub:owner/small", "licence": "apache-2.0"}
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert "pretrained" not in manifest["source"]  # digits are trained from random weights
    sizes = dict.fromkeys(manifest["precisions"], 1)
    for licence, said in (
        ("apache-2.0", "licence apache-2.0."),
        (None, "their licence is not known here: ask where they come from."),
    ):
        manifest["source"]["pretrained"] = {**origin, "licence": licence}
        write_model_card(tmp_path / "README.md", manifest, sizes)
        line = f"The backbone started from pretrained weights of small: hf-hub:owner/small; {said}"
        assert line in (tmp_path / "README.md").read_text().splitlines()
    # An export asks the configuration of the checkpoint for them, and every file's metadata has the answer.
    monkeypatch.setattr(ResNet20Backbone, "origin", lambda self: Origin("small", "hf-hub:owner/small", "apache-2.0"))
    made = make_bundle(run_folder / "checkpoints" / "best.safetensors", tmp_path / "named", Options(provider="cpu"))
    card = open_bundle(made.folder).card
    assert card.source["pretrained"] == origin
    session = onnxruntime.InferenceSession(made.folder / "model.onnx", providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map[METADATA])["source"]["pretrained"] == origin


def test_any_package_of_onnxruntime_will_do(monkeypatch):
    def version(package):
        if package.startswith("onnxruntime"):
            raise importlib.metadata.PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr(module, "version", version)
    assert module._versions()["onnxruntime"] == onnxruntime.__version__


def test_a_changed_file_is_noticed(bundle, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    with (copy / "model.onnx").open("r+b") as file:
        file.seek(1000)
        file.write(b"x")
    with pytest.raises(UserError, match=r"model.onnx' is not the file that manifest.json lists"):
        open_bundle(copy)


def test_an_existing_folder_is_not_overwritten(run_folder, bundle):
    with pytest.raises(UserError, match="exists; remove it, or choose another folder"):
        make_bundle(run_folder / "checkpoints" / "best.safetensors", bundle, Options())


def test_a_provider_that_is_not_there_is_an_error(bundle):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(UserError, match=r"provider 'cuda'"):
        Runtime(bundle / "model.onnx", "cuda")
    assert Runtime(bundle / "model.onnx", "auto").provider == "CPUExecutionProvider"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "arm"], "--target arm does nothing for fp32; add --precision int8"),
        (
            ["--calibration", "20", "--precision", "fp16"],
            "--calibration 20 does nothing for fp32 and fp16",
        ),
        (["--max-drop", "0"], "--max-drop 0.0 does nothing for fp32; add --precision fp16 or int8"),
    ],
)
def test_an_option_of_a_precision_that_is_not_made_is_refused(options, message, run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["export", str(run_folder), "--out", str(tmp_path / "b"), *options])
    with pytest.raises(UserError, match=re.escape(message)):
        export.main()
    assert not (tmp_path / "b").exists()


def test_command(run_folder, tmp_path):
    command = [sys.executable, "-m", "cibl_ray.export", str(run_folder), "--out", str(tmp_path / "b"), "--name", "digits-2"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "CPUExecutionProvider" in done.stdout
    assert "agrees with torch at batch 1, 2, 17" in done.stderr
    assert open_bundle(tmp_path / "b").card.name == "digits-2"
    refused = subprocess.run([*command[:-1], "../x"], cwd=REPOSITORY, capture_output=True, text=True)
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ([], "answers have tail shift -0.65 (chosen on 100 held-out images); --tail-shift 0: as trained"),
        (["--tail-shift", "0.5"], "answers have tail shift 0.5; --tail-shift 0: as trained"),
        (["--tail-shift", "0"], None),
    ],
)
def test_the_command_says_that_answers_are_shifted(flags, line, tmp_path, monkeypatch, capsys):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    (tmp_path / "checkpoints" / "best.safetensors").touch()
    chosen = {"shift": -0.65, "metric": "balanced", "before": 0.6, "after": 0.8, "images": 100}
    (tmp_path / "result.json").write_text(json.dumps({"best": {"tail_shift": chosen}}))
    made = []
    monkeypatch.setattr(
        "cibl_ray.exporting.make_bundle.make_bundle",
        lambda path, out, options: made.append(options) or SimpleNamespace(table=lambda: ""),
    )
    monkeypatch.setattr(sys, "argv", ["export", str(tmp_path), *flags])
    export.main()
    assert len(made) == 1
    assert [text for text in capsys.readouterr().out.splitlines() if "tail shift" in text] == [line] * (line is not None)
