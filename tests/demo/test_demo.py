"""The demo: its data, and the whole of it, shortened."""

from pathlib import Path

import pytest
import torch

from gradbank.datasets import FACES, Glyphs, augment, glyphs
from gradbank_server.demo import run
from gradbank_server.demo.recipe import Encoder, batches, recall_at_1


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("glyphs")


@pytest.fixture(scope="module")
def drawn(cache: Path) -> Glyphs:
    return glyphs(cache)


def test_the_set_has_many_classes_of_few_images(drawn: Glyphs) -> None:
    assert len(drawn.characters) == 2069
    assert drawn.images.shape == (2069 * FACES, 28, 28)
    assert torch.equal(drawn.labels.bincount(), torch.full((2069,), FACES))


def test_the_cache_gives_the_same_images_and_a_damaged_one_is_drawn_again(drawn: Glyphs, cache: Path) -> None:
    assert torch.equal(glyphs(cache).images, drawn.images)
    (file,) = cache.glob("*.npz")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert torch.equal(glyphs(cache).images, drawn.images)
    assert file.stat().st_size == len(whole)


def test_training_and_test_have_no_class_in_common(drawn: Glyphs) -> None:
    seen, unseen = drawn.split(seed=3)
    assert not set(seen.characters) & set(unseen.characters)
    assert len(seen) + len(unseen) == len(drawn)


def test_a_batch_has_as_many_images_of_each_class_as_asked(drawn: Glyphs) -> None:
    images, labels = next(batches(drawn, 8, 3, torch.Generator().manual_seed(0)))
    assert images.shape == (24, 1, 28, 28)
    assert sorted(labels.bincount().tolist())[-8:] == [3] * 8


def test_recall_is_that_of_a_plain_loop() -> None:
    torch.manual_seed(0)
    embeddings, labels = torch.randn(37, 5), torch.randint(0, 6, (37,))
    hits = 0
    for i in range(37):
        cosines = torch.nn.functional.cosine_similarity(embeddings[i][None], embeddings)
        cosines[i] = -2
        hits += int(labels[cosines.argmax()] == labels[i])
    assert recall_at_1(embeddings, labels, block=10) == pytest.approx(hits / 37)


def test_an_embedding_does_not_depend_on_its_neighbours_in_evaluation(drawn: Glyphs) -> None:
    encoder, images = Encoder(16), augment(drawn.images[:20], torch.Generator().manual_seed(0))
    torch.testing.assert_close(encoder.embed(images)[:5], encoder.embed(images[:5]))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_demo_learns_and_its_gradients_are_right(
    cache: Path, drawn: Glyphs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "demo.png"
    assert run(150, picture, cache) == 0
    said = capsys.readouterr().out
    assert "remote - local = 0.0e+00" in said
    assert picture.read_bytes().startswith(b"\x89PNG")
