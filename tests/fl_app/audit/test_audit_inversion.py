"""Gradient inversion: measures against their definitions, and what real updates give away, bare and protected."""

import json

import numpy as np
import pytest
import torch
from audit_helpers import made, silent
from scipy.stats import norm as normal

from fl_app.audit.inversion import BLANK, CLIPPED, MASKED, NOISED, PLAIN, invert, seen
from fl_app.audit.likeness import psnr, squared_error, ssim
from fl_app.audit.pictures import draw
from fl_app.audit.target import load
from fl_app.config.faults import ConfigError
from strategies.update import DELTA, Layout, Section, Update


def test_equal_pictures_are_as_like_as_can_be():
    picture = torch.rand(3, 1, 9, 11, generator=torch.Generator().manual_seed(0))
    assert squared_error(picture, picture).tolist() == [0, 0, 0]
    assert psnr(picture, picture).tolist() == pytest.approx([100, 100, 100])
    assert ssim(picture, picture).tolist() == pytest.approx([1, 1, 1])


@pytest.mark.parametrize(("a", "b"), [(0.2, 0.7), (0.0, 1.0), (0.5, 0.4)])
def test_even_pictures_have_closed_forms(a, b):
    first, second = torch.full((1, 1, 8, 8), a), torch.full((1, 1, 8, 8), b)
    assert squared_error(first, second).item() == pytest.approx((a - b) ** 2, rel=1e-5)
    assert psnr(first, second).item() == pytest.approx(-20 * np.log10(abs(a - b)), abs=1e-4)
    expected = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
    assert ssim(first, second).item() == pytest.approx(expected, rel=1e-4)


def test_one_window_is_equation_13_written_out():
    random = torch.Generator().manual_seed(1)
    x, y = (torch.rand(1, 1, 7, 7, generator=random).double() for _ in range(2))
    mx, my, vx, vy = x.mean(), y.mean(), x.var(correction=0), y.var(correction=0)
    cov = ((x - mx) * (y - my)).mean()
    expected = (2 * mx * my + 1e-4) * (2 * cov + 9e-4)
    expected /= (mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)
    assert ssim(x, y).item() == pytest.approx(expected.item())


SIZE = 20_000


@pytest.fixture(scope="module")
def views():
    rng = np.random.default_rng(0)
    vector = rng.standard_normal(SIZE).astype(np.float32)
    vector *= np.float32(4 / np.linalg.norm(vector))
    update = Update({DELTA: Section(vector, Layout(("w",), ((SIZE,),)))}, 1.0, (0,), 0)
    return vector, seen([update], 2.0, 0.5)


def test_a_clip_shortens_and_turns_nothing(views):
    vector, found = views
    np.testing.assert_array_equal(found[PLAIN][0], vector)
    assert np.linalg.norm(found[CLIPPED][0]) == pytest.approx(2.0, rel=1e-5)
    cosine = found[CLIPPED][0] @ vector / 2.0 / 4.0
    assert cosine == pytest.approx(1, abs=1e-6)


def test_noise_has_the_deviation_that_it_is_said_to_have(views):
    """z·C = 1; of 20,000 normal numbers the deviation is off by 3% with odds under 1e-8."""
    _, found = views
    noise = found[NOISED][0] - found[CLIPPED][0]
    assert noise.std() == pytest.approx(1.0, rel=0.03)
    assert (found[NOISED] != seen_again(views)[NOISED]).any()


def seen_again(views):
    vector, _ = views
    update = Update({DELTA: Section(vector, Layout(("w",), ((SIZE,),)))}, 1.0, (0,), 0)
    return seen([update], 2.0, 0.5)


def test_a_masked_upload_is_uniform_and_tells_nothing_of_its_vector(views):
    """Uniform on ±10·C: shares of sixteen bins are off by 5 deviations, or the correlation by 5/√d, with odds under
    1e-5 in all for a test that is run with fresh masks; both limits are set at 6, odds under 1e-7."""
    vector, found = views
    masked = found[MASKED][0]
    shares = np.histogram(masked, bins=16, range=(-20.0, 20.0))[0]
    assert shares.sum() == SIZE
    deviation = np.sqrt(SIZE / 16 * 15 / 16)
    assert np.abs(shares - SIZE / 16).max() < 6 * deviation
    assert abs(np.corrcoef(masked, vector)[0, 1]) < 6 / np.sqrt(SIZE)
    assert 16 * 2 * normal.sf(6) < 1e-6


@pytest.mark.pictures
def test_pictures_come_out_of_plain_and_clipped_updates_and_not_of_the_others(tmp_path):
    """Digits of 8 × 8 through the real client code: found to 15 dB and more where nothing hides the direction, and
    worse than by guessing the mean picture under noise (z = 1) and masks."""
    folder = made(tmp_path, "clip=fixed")
    told: list[int] = []
    found = invert(load(folder), 3, steps=300, progress=lambda done, total: told.append(done))
    assert told == list(range(1, 301))
    figures = {name: np.median(found.likeness(name)["psnr"]) for name in found.found}
    for open_view in (PLAIN, CLIPPED):
        assert figures[open_view] > 15
        assert figures[open_view] > figures[BLANK] + 3
    for hidden in (NOISED, MASKED):
        assert figures[hidden] < figures[BLANK]
    assert found.norm < found.norms.min()
    json.dumps(found.to_dict())
    draw(found, tmp_path / "found.png")
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")


def test_a_task_without_pictures_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = ["x,y,kind", *(f"{i},{i % 7},{'ab'[i % 2]}" for i in range(60))]
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    folder = made(tmp_path, "task=csv", "task.path=rows.csv", "task.target=kind", "num_clients=2")
    with pytest.raises(ConfigError, match="needs pictures"):
        invert(load(folder), 1, progress=silent)
