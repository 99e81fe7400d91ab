import math

import pytest
import torch

from sbora_diffusion.evaluation.metrics import (
    classify,
    image_alignment,
    recall_at_1,
    text_alignment,
)


def features(count, seed, width=5):
    """Neither of unit length nor of one scale."""
    generator = torch.Generator().manual_seed(seed)
    lengths = 0.1 + 10 * torch.rand(count, 1, generator=generator)
    return lengths * torch.randn(count, width, generator=generator)


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


@pytest.mark.parametrize("count", (1, 7))
def test_text_alignment_is_the_cosine_with_the_own_text(count):
    images, texts = features(count, 1), features(count, 2)
    expected = [cosine(a, b) for a, b in zip(images.tolist(), texts.tolist(), strict=True)]
    assert text_alignment(images, texts).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("count", "references"), ((1, 1), (3, 5), (5, 3)))
def test_image_alignment_is_the_mean_over_all_references(count, references):
    images, others = features(count, 3), features(references, 4)
    expected = [
        sum(cosine(image, other) for other in others.tolist()) / references
        for image in images.tolist()
    ]
    assert image_alignment(images, others).tolist() == pytest.approx(expected, abs=1e-6)


def test_negative_cosines_stay_negative_and_nothing_is_scaled():
    images = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    assert text_alignment(images, -images).tolist() == [-1, -1]
    assert image_alignment(images, -images[:1]).tolist() == [-1, 0]


def naive_recall(images, texts):
    hits = 0
    for k, image in enumerate(images):
        own = cosine(image, texts[k])
        hits += all(own > cosine(image, text) for j, text in enumerate(texts) if j != k)
    return hits / len(images)


def test_recall_counts_pictures_whose_own_text_is_the_nearest():
    texts = features(40, 5)
    images = texts / texts.norm(dim=1, keepdim=True) + 0.5 * features(40, 6, 5).sign()
    expected = naive_recall(images.tolist(), texts.tolist())
    assert 0 < expected < 1
    assert recall_at_1(images, texts) == pytest.approx(expected)


def test_recall_of_equal_features_is_none_at_all():
    same = torch.ones(4, 3)
    assert recall_at_1(same, same) == 0
    assert recall_at_1(torch.eye(4), torch.eye(4)) == 1
    assert recall_at_1(same[:1], same[:1]) == 1


def test_classify_picks_the_nearest_text_by_angle_and_not_by_length():
    images, texts = features(9, 7), features(4, 8)
    texts[2] *= 100
    expected = [
        max(range(4), key=lambda k, image=image: cosine(image, texts[k].tolist()))
        for image in images.tolist()
    ]
    assert len(set(expected)) > 1
    assert classify(images, texts).tolist() == expected


def test_metrics_leave_their_input_alone():
    images, texts = features(3, 9), features(3, 10)
    before = images.clone(), texts.clone()
    recall_at_1(images, texts)
    image_alignment(images, texts)
    assert torch.equal(images, before[0]) and torch.equal(texts, before[1])


def test_wrong_shapes_are_refused():
    with pytest.raises(AssertionError):
        text_alignment(features(3, 1), features(2, 1))
    with pytest.raises(AssertionError):
        image_alignment(features(3, 1), features(0, 1))
    with pytest.raises(AssertionError):
        recall_at_1(features(0, 1), features(0, 1))
    with pytest.raises(AssertionError):
        classify(features(3, 1), features(0, 1))
