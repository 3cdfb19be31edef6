"""Counts of predictions, compared with slow loops."""

import csv
from collections import Counter

import numpy as np
import pytest

from hatnet_train.results import Results, write_per_class


@pytest.fixture(scope="module")
def results():
    """Predictions of 200 images of four of five classes, a third of them wrong."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 200)
    predictions = np.where(rng.random(200) < 0.3, rng.integers(0, 5, 200), labels)
    return Results(tuple("abcde"), np.arange(200), labels, predictions, rng.random(200))


def test_every_class_is_counted(results):
    pairs = list(zip(results.labels.tolist(), results.predictions.tolist(), strict=True))
    for place, row in enumerate(results.per_class()):
        own = [prediction for label, prediction in pairs if label == place]
        assert row["class"] == "abcde"[place]
        assert (row["images"], row["correct"]) == (len(own), own.count(place))
        assert row["top1"] == (pytest.approx(100 * own.count(place) / len(own)) if own else None)
        assert row["predicted"] == sum(prediction == place for _, prediction in pairs)
        others = Counter("abcde"[prediction] for prediction in own if prediction != place)
        assert row["confused_with"] == dict(others)
        assert [*row["confused_with"].values()] == sorted(others.values(), reverse=True)
    assert Counter(pairs) == {(label, prediction): n for label, prediction, n in results.confusions()}


def test_mistakes_come_most_confident_first_and_hits_least_confident(results):
    wrong = [row for row in range(200) if results.labels[row] != results.predictions[row]]
    right = [row for row in range(200) if row not in wrong]
    probability = results.probabilities.__getitem__
    assert results.confident_mistakes(7) == sorted(wrong, key=probability, reverse=True)[:7]
    assert results.unsure_hits(7) == sorted(right, key=probability)[:7]
    assert len(results.confident_mistakes(1000)) == len(wrong)


def test_the_csv_has_a_row_for_every_class(results, tmp_path):
    write_per_class(results, tmp_path / "classes.csv")
    with (tmp_path / "classes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == list("abcde")
    assert sum(int(row["images"]) for row in rows) == sum(int(row["predicted"]) for row in rows) == 200
    assert (rows[4]["images"], rows[4]["top1"], rows[4]["confused_with"]) == ("0", "", "")
    (name, number), *_ = results.per_class()[0]["confused_with"].items()
    assert rows[0]["confused_with"].startswith(f"{name} {number}")
