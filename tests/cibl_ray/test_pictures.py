"""Pictures of a run, whatever its log holds."""

from cibl_ray.evaluation.pictures import save_learning_curves


def test_curves_of_a_run_that_went_on_with_another_loss(tmp_path):
    terms = ({"cross_entropy": 1.0, "contrastive": 3.0}, {"center": 1.0, "contrastive": 3.0})
    rows = [
        {"epoch": number, "train": {"accuracy": 0.5, "loss": 2.0, **more}, "rate": {"lr": 0.1}}
        for number, more in enumerate(terms, start=1)
    ]
    for each in (rows, rows[::-1]):
        save_learning_curves(tmp_path / "curves.png", each)
        assert (tmp_path / "curves.png").stat().st_size > 5000
