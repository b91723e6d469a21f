"dinolab.core.show: what the colours mean, and where things stand in the pictures."

import subprocess
import sys

import numpy as np
import pytest

from dinolab.core.errors import InputError
from dinolab.core.show import (
    PLANES,
    Pca,
    fit_pca,
    label_colors,
    overlay_labels,
    panel_figure,
    png_bytes,
    same_place,
    save_figure,
    show_features,
    show_images,
    show_planes,
    similarity,
)


def random_features(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape) @ rng.normal(size=(shape[-1],) * 2) + 5


def test_import_is_light():
    code = "import sys, dinolab.core.show; assert not {'matplotlib', 'torch', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# PCA


def test_pca_is_a_singular_value_decomposition():
    x = random_features(300, 12)
    ours, (_, spread, directions) = fit_pca(x, 12), np.linalg.svd(x - x.mean(0), full_matrices=False)
    np.testing.assert_allclose(abs(ours.components), abs(directions), atol=1e-5)
    np.testing.assert_allclose(ours.explained, spread**2 / (spread**2).sum(), atol=1e-6)
    np.testing.assert_allclose(ours.components @ ours.components.T, np.eye(12), atol=1e-5)
    largest = np.take_along_axis(ours.components, abs(ours.components).argmax(1)[:, None], 1)
    assert (largest > 0).all()


def test_pca_does_not_depend_on_the_cut_into_blocks():
    x = random_features(24, 10, 10, 8).astype("float16")
    pca = fit_pca(x)
    whole = pca.rgb(x)
    blocks = np.concatenate([pca.rgb(x[i : i + 5]) for i in range(0, 24, 5)])
    assert whole.dtype == np.uint8 and whole.shape == (24, 10, 10, 3)
    assert abs(whole.astype(int) - blocks).max() <= 1
    np.testing.assert_allclose(pca.transform(x.astype("float64")), pca.transform(x), atol=1e-4)


def test_pca_uses_the_range_of_the_sample():
    x = random_features(5000, 4)
    rgb = fit_pca(x).rgb(x)
    assert all(0.005 < (rgb[:, i] == v).mean() < 0.02 for i in range(3) for v in (0, 255))


@pytest.mark.parametrize(
    "x, varying",
    [
        (np.full((40, 5), 1e4, "float32"), 0),
        (np.full((40, 5), 0.1), 0),
        (np.ones((1, 5)), 0),
        (np.ones((2, 5)) * [[1], [2]], 1),
        (np.outer(np.arange(40), [1, 0, 0, 0, 0]) + 1e3, 1),
        (np.zeros((9, 5)), 0),
        (random_features(3, 5), 2),
    ],
)
def test_pca_of_fewer_directions_than_components(x, varying):
    pca = fit_pca(x)
    assert (np.linalg.norm(pca.components, axis=1) > 0.5).sum() == varying
    assert pca.explained.sum() == pytest.approx(1 if varying else 0)
    assert (pca.rgb(x)[:, varying:] == 128).all()


def test_pca_samples_without_copying(tmp_path):
    x = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", "float16", (8, 64, 64, 64))  # c z y x
    x[0, 0], x[1, :, 0] = 1, 2
    pca = fit_pca(np.moveaxis(x, 0, -1), sample=500)
    again = fit_pca(np.moveaxis(x, 0, -1), sample=500)
    other = fit_pca(np.moveaxis(x, 0, -1), sample=500, seed=1)
    np.testing.assert_array_equal(pca.mean, again.mean)
    assert (pca.mean != other.mean).any()


def test_pca_takes_torch_and_json():
    torch = pytest.importorskip("torch")
    x = random_features(200, 6).astype("float32")
    pca = fit_pca(torch.tensor(x, requires_grad=True))
    np.testing.assert_array_equal(Pca.from_dict(pca.to_dict()).rgb(x), fit_pca(x).rgb(x))
    assert pca.rgb(torch.tensor(x, dtype=torch.bfloat16)).shape == (200, 3)


@pytest.mark.parametrize(
    "x, n, message",
    [
        (np.ones((5, 2)), 3, "3 components of 2 channels"),
        (np.ones((5, 2)), 0, "expected 1 to 2"),
        (np.ones((0, 4)), 3, "at least one"),
        (np.array([[1, 2, 3], [1, np.inf, 3]]), 3, "1 of 2 sampled"),
    ],
)
def test_pca_refusals(x, n, message):
    with pytest.raises(InputError, match=message):
        fit_pca(x, n)


# similarity


def test_similarity_is_torchs():
    torch = pytest.importorskip("torch")
    f = np.random.default_rng(0).normal(size=(7, 3, 4, 5)).astype("float32")
    expected = torch.nn.functional.cosine_similarity(
        torch.tensor(f), torch.tensor(f)[:, 1:2, 2:3, 3:4], dim=0
    )
    np.testing.assert_allclose(similarity(f, (1, 2, 3)), expected, atol=1e-6)
    np.testing.assert_allclose(similarity(torch.tensor(f).half(), (1, 2, 3)), expected, atol=2e-3)
    for wrong in [(1, 2), (3, 0, 0), (-1, 0, 0)]:
        with pytest.raises(InputError, match="expected 3 indices inside it"):
            similarity(f, wrong)


# geometry


def scales(fig, extents):
    "Pixels per nm of the panels, horizontally and vertically."
    for ax, (h, w) in extents:
        box = ax.get_window_extent()
        yield from (box.width / w, box.height / h)


@pytest.mark.parametrize(
    "shape, size",
    [
        ((20, 20, 20), (8, 8, 8)),
        ((24, 96, 88), (2.2e6, 2e6, 2e6)),
        ((10, 64, 200), (40, 8, 8)),
        ((100, 10, 30), (4, 16, 8)),
        ((1, 50, 50), (5, 5, 5)),
    ],
)
def test_panels_have_one_scale_and_do_not_overlap(shape, size):
    extent = dict(zip("zyx", np.multiply(shape, size)))
    raw, features = (
        np.random.default_rng(0).random(shape),
        np.random.default_rng(0).random((4, *(max(n // 2, 1) for n in shape))),
    )
    for fig, columns in [
        (show_planes(raw, voxel_size=size), 1),
        (show_features(raw, features, voxel_size=size), 3),
        (show_features(raw, dict(fused=features, xy=features), voxel_size=size), 4),
    ]:
        panels = fig.axes[: 3 * columns]
        values = list(
            scales(
                fig,
                [(ax, [extent[a] for a in PLANES[p][1]]) for ax, p in zip(panels, list(PLANES) * columns)],
            )
        )
        assert np.ptp(values) < 1e-6 * max(values)
        boxes = [ax.get_position() for ax in fig.axes]
        assert all(0 <= b.x0 and b.x1 <= 1 and 0 <= b.y0 and b.y1 <= 1 for b in boxes)
        overlaps = [
            (a, b)
            for i, a in enumerate(boxes)
            for b in boxes[:i]
            if min(a.x1, b.x1) > max(a.x0, b.x0) + 1e-9 and min(a.y1, b.y1) > max(a.y0, b.y0) + 1e-9
        ]
        assert not overlaps


def brightest(ax):
    "Centre of the brightest pixel of a panel, in the panel's units (row, column)."
    image = ax.images[0]
    values = np.asarray(image.get_array())
    values = values.sum(-1) if values.ndim == 3 else values
    left, right, bottom, top = image.get_extent()
    r, c = np.unravel_index(values.argmax(), values.shape)
    return (r + 0.5) * bottom / values.shape[0], (c + 0.5) * right / values.shape[1]


def test_marks_point_at_the_voxel():
    at, size = (3, 7, 12), (40, 8, 8)
    raw = np.zeros((9, 20, 30))
    raw[at] = 1
    features = np.random.default_rng(0).normal(
        size=(6, 9, 20, 30)
    )  # the same voxel is the only one with similarity 1
    fig = show_features(raw, features, at=at, voxel_size=size)
    where = dict(zip("zyx", np.multiply(np.add(at, 0.5), size)))
    for plane, image, heat in zip(PLANES, fig.axes[:3], fig.axes[6:9]):
        expected = [where[a] for a in PLANES[plane][1]]
        assert brightest(image) == pytest.approx(expected) and brightest(heat) == pytest.approx(expected)
        assert [image.lines[0].get_ydata()[0], image.lines[1].get_xdata()[0]] == pytest.approx(expected)
        assert [heat.lines[0].get_ydata()[0], heat.lines[0].get_xdata()[0]] == pytest.approx(expected)


def test_same_place_is_nearest_in_space():
    for n, m in [(8, 4), (4, 8), (9, 4), (5, 7), (1, 6), (6, 1)]:
        for i in range(n):
            (j,) = same_place((i,), (n,), (m,))
            assert 0 <= j < m and abs((i + 0.5) / n - (j + 0.5) / m) <= 0.5 / m + 1e-9


def test_coarse_labels_cover_their_box():
    labels = np.zeros((4, 4, 4), int)
    labels[2:, 2:, 2:] = 5
    fig = show_planes(np.zeros((16, 12, 8)), labels, classes={5: ("cell", "#ff0000")}, at=(12, 9, 6))
    for ax in fig.axes:
        red = ax.images[0].get_array()[..., 0] > ax.images[0].get_array()[..., 1]
        assert red.mean() == 0.25 and red[red.shape[0] // 2 :, red.shape[1] // 2 :].all()
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["cell"]


def test_only_three_slices_are_read():
    class Counted:
        shape, read = (50, 60, 70), 0

        def __getitem__(self, key):
            part = np.zeros(self.shape)[key]
            Counted.read += part.size
            return part

    show_planes(Counted())
    assert Counted.read == 60 * 70 + 50 * 70 + 50 * 60


def test_planes_take_colour_and_torch():
    torch = pytest.importorskip("torch")
    rgb = np.random.default_rng(0).integers(0, 255, (6, 7, 8, 3), dtype="uint8")
    np.testing.assert_array_equal(show_planes(rgb, at=(1, 2, 3)).axes[1].images[0].get_array(), rgb[:, 2])
    show_features(torch.rand(6, 7, 8), torch.rand(5, 3, 3, 4, requires_grad=True).half())


def test_labels_in_the_form_of_data_sets():
    classes = {0: ("outside", "#101010"), 1: ("membrane", "#ffffff"), 7: ("nucleus", "#00ff00")}
    assert label_colors(classes) == classes
    rgb = overlay_labels(np.zeros((6, 6)), np.full((6, 6), 7), classes, alpha=0.5)
    assert rgb[3, 3].tolist() == [64, 192, 64]  # half of the grey of a constant image, half green
    show_planes(np.full((6, 6, 6), 7), classes=classes)


def test_a_number_of_classes_is_enough():
    "As `label_colors` takes it: the legend has a name for each class but the background, and room below."
    labels = np.arange(27).reshape(3, 3, 3) % 3
    fig = show_planes(labels, classes=3)
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["1", "2"]
    named = show_planes(labels, classes=["background", "1", "2"])
    assert fig.get_figheight() == named.get_figheight()
    assert fig.get_figheight() > show_planes(labels).get_figheight() + 0.2  # inches, a row of the legend


def test_images_of_several_sizes():
    fig = show_images([np.ones((4, 8)), np.ones((8, 4)), np.ones((5, 5, 3))], ["a", "b", "c"], ncols=2)
    assert [ax.get_title() for ax in fig.axes if ax.images] == ["a", "c", "b"]  # column by column
    assert len(fig.axes) == 3


# files


def test_figures_are_small_and_repeatable(tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    fig = show_features(
        rng.normal(size=(128, 128, 128)), rng.normal(size=(4, 64, 64, 64)), voxel_size=(8, 8, 8)
    )  # noise: the worst case
    path = save_figure(fig, tmp_path / "deep" / "a.png")
    assert path.stat().st_size <= 100_000 and Image.open(path).size[0] >= 400
    assert path.read_bytes() == fig._repr_png_() == png_bytes(fig)
    with pytest.raises(InputError, match="ends in .png"):
        save_figure(fig, tmp_path / "a.pdf")
    with pytest.raises(InputError, match="at most 1 kB"):
        save_figure(fig, tmp_path / "b.png", max_kb=1)
    assert not (tmp_path / "b.png").exists()


def test_drawing_changes_nothing_global():
    import matplotlib

    with matplotlib.rc_context({"font.size": 31, "axes.facecolor": "red", "image.origin": "lower"}):
        before = dict(matplotlib.rcParams)
        fig = show_planes(np.random.default_rng(0).random((8, 8, 8)))
        assert dict(matplotlib.rcParams) == before
    assert fig.axes[0].title.get_fontsize() == 10 and fig.axes[0].get_facecolor() == (1, 1, 1, 1)
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: show_planes(np.ones((4, 4))), "a volume z y x"),
        (lambda: show_planes(np.ones((4, 4, 4)), at=(0, 0, 4)), "inside a volume"),
        (lambda: show_planes(np.ones((4, 4, 4)), voxel_size=(1, 1)), "three positive lengths"),
        (lambda: show_planes(np.ones((4, 4, 4)), voxel_size=(1, 1, np.nan)), "three positive lengths"),
        (lambda: show_features(np.ones((4, 4, 4)), np.ones((4, 4, 4))), "expected c z y x"),
        (lambda: show_images([]), "at least one image"),
        (
            lambda: show_features(
                np.ones((4, 4, 4)), dict(a=np.random.rand(5, 4, 4, 4), b=np.ones((6, 4, 4, 4)))
            ),
            "expected 5 channels",
        ),
        (lambda: overlay_labels(np.ones((3, 4)), np.ones((4, 3), int)), "same height and width"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_panel_figure_keeps_to_its_limits():
    for columns in ([[(1, 1)]], [[(1, 50)]], [[(50, 1)]], [[(1, 1)] * 3] * 6):
        fig, _ = panel_figure(columns)
        assert fig.get_figwidth() <= 9 + 1e-9 and fig.get_figheight() <= 8 + 1e-9
