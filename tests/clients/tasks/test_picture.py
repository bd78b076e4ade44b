"""The picture of who holds which classes."""

import matplotlib
import matplotlib.image
import numpy as np
import pytest
from matplotlib import pyplot

from clients.tasks import FederatedData, Mnist
from clients.tasks.picture import label_counts_figure


@pytest.mark.parametrize(("clients", "classes"), [(1, 10), (10, 10), (100, 10), (200, 62)])
def test_up_to_two_hundred_clients_have_a_bar_each_in_every_class_s_colour(clients, classes):
    counts = np.random.default_rng(0).integers(0, 9, (clients, classes))
    (axes,) = label_counts_figure(counts, "title").axes
    assert [len(bars.get_paths()) for bars in axes.collections] == [clients] * classes
    for label, bars in enumerate(axes.collections):
        heights = [np.ptp(path.vertices[:, 1]) for path in bars.get_paths()]
        assert heights == counts[:, label].tolist()
    assert len({bars.get_facecolor().tobytes() for bars in axes.collections}) == classes


def test_more_clients_are_a_map_with_a_column_each():
    counts = np.random.default_rng(0).integers(1, 9, (1000, 10))
    axes = label_counts_figure(counts, "title").axes[0]
    (image,) = axes.images
    shares = np.asarray(image.get_array())
    assert shares.shape == (10, 1000)
    assert shares.sum(axis=0) == pytest.approx(np.ones(1000))


def test_plot_writes_a_png_and_leaves_matplotlib_as_it_was(tmp_path):
    backend = matplotlib.rcParams._get_backend_or_none()
    path = tmp_path / "new folder" / "partition.png"
    FederatedData(Mnist(), 100, partition="dirichlet").plot(path)
    pixels = matplotlib.image.imread(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert pixels.shape[0] > 400
    assert pixels.shape[1] > 1000
    assert len(np.unique(pixels[..., :3].reshape(-1, 3), axis=0)) > 10
    assert pyplot.get_fignums() == []
    assert matplotlib.rcParams._get_backend_or_none() == backend
