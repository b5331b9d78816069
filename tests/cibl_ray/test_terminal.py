"""What a run shows where the output is no terminal. No Ray cluster is started."""

from types import SimpleNamespace

from cibl_ray.cluster.environment import configure_ray_env
from cibl_ray.run import progress
from cibl_ray.run.progress import Terminal

configure_ray_env(own=True)

from cibl_ray.cluster.progress import RelayedProgress  # noqa: E402


def test_a_minute_without_an_image_has_no_rate(monkeypatch, capsys):
    """Evaluation and saving after a resumed run's last step, or workers that are stopped before their first."""
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)  # a line whenever something is told
    monkeypatch.setattr(progress, "NO_BAR", True)
    terminal = Terminal()
    terminal.begin(100, 20)
    terminal.advance(0)
    assert capsys.readouterr().out == ""
    terminal.advance(40)
    assert capsys.readouterr().out.startswith("60 % of all images, ")
    terminal.begin(100, 60)  # the workers were replaced
    terminal.advance(0)
    assert capsys.readouterr().out == ""


def test_a_worker_posts_no_count_of_nothing(monkeypatch):
    posted = []
    relay = SimpleNamespace(post=SimpleNamespace(remote=lambda *note: posted.append(note)))
    monkeypatch.setattr("cibl_ray.cluster.progress.ray.wait", lambda sent, **how: (sent, []))
    worker = RelayedProgress(relay)
    worker.begin(100, 100)
    worker.close()
    assert posted == [("begin", (100, 100))]
    worker.advance(16)
    worker.close()
    assert posted[1:] == [("advance", 16)]
