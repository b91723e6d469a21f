"Image files as people have them, written by the libraries that write them, against what Pillow shows."

import unicodedata
import zlib

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms, ImageOps
from skimage import data as samples

from dinolab.core.errors import InputError
from dinolab.core.region import Box
from dinolab.data.pixels import OpenImage, Range, open_image, open_raster, read_image, read_pixels

ASTRONAUT = np.ascontiguousarray(samples.astronaut()[40:105, 160:207])  # 65 x 47
GREY = np.ascontiguousarray(samples.camera()[100:165, 200:247])
DEEP = ASTRONAUT * np.uint16(257)
OPACITY = (np.indices(GREY.shape).sum(0) % 200 + 30).astype(np.uint8)
PHOTO, GRAY = Image.fromarray(ASTRONAUT), Image.fromarray(GREY)


def shown(path):
    "h w 3, 8 bits: what Pillow shows."
    with Image.open(path) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def turned(n, image=PHOTO):
    exif = Image.Exif()
    exif[0x0112] = n
    return dict(exif=exif)


def premultiplied(dtype, top):
    opacity = OPACITY.astype(float)[..., None] / 255
    return np.concatenate([ASTRONAUT / 255 * opacity, opacity], -1) * top + 0.5 * (dtype != np.float32)


def pil(image, **options):
    return lambda path: image.save(path, **options)


def tif(array, **options):
    return lambda path: tifffile.imwrite(path, array, **options)


def coded(data):
    return lambda path: path.write_bytes(data() if callable(data) else data)


def lab():
    "The photograph in CIELAB, as ImageCms makes it."
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.applyTransform(PHOTO, ImageCms.buildTransform(*profiles, "RGB", "LAB"))


PLANES = np.ascontiguousarray(np.moveaxis(ASTRONAUT, -1, 0))
MAP16 = np.stack([np.arange(256)[::-1] * 256, np.arange(256) * 256, np.arange(256) // 2 * 256]).astype("u2")
INDEXED = PHOTO.quantize(200)
BITS = GREY > 128
TRANSPARENT = PHOTO.copy()
TRANSPARENT.putalpha(Image.fromarray(OPACITY))
GREY_ALPHA = GRAY.copy()
GREY_ALPHA.putalpha(Image.fromarray(OPACITY))
TABLE = {  # name -> (writer, largest difference of 255)
    "1.png": (pil(Image.fromarray(BITS)), 0),
    "1-g4.tif": (pil(Image.fromarray(BITS), compression="group4"), 0),
    "1-g3.tif": (pil(Image.fromarray(BITS), compression="group3"), 0),
    "1.bmp": (pil(Image.fromarray(BITS)), 0),
    "1-white.tif": (tif(BITS, photometric="miniswhite"), 0),
    "1.pbm": (pil(Image.fromarray(BITS)), 0),
    "l.png": (pil(GRAY), 0),
    "l.jpg": (pil(GRAY, quality=90), 0),
    "l.tif": (pil(GRAY), 0),
    "l.bmp": (pil(GRAY), 0),
    "l.gif": (pil(GRAY), 0),
    "l.webp": (pil(GRAY, lossless=True), 0),
    "l.jp2": (pil(GRAY), 0),
    "l.pgm": (pil(GRAY), 0),
    "l-white.tif": (tif(GREY, photometric="miniswhite", compression="lzw"), 0),
    "la.png": (pil(GREY_ALPHA), 0),
    "la.tif": (pil(GREY_ALPHA), 0),
    "l-transparent.png": (pil(GRAY, transparency=7), 0),
    "p.png": (pil(INDEXED), 0),
    "p4.png": (pil(PHOTO.quantize(16), bits=4), 0),
    "p2.png": (pil(PHOTO.quantize(4), bits=2), 0),
    "p.gif": (pil(INDEXED), 0),
    "p.bmp": (pil(INDEXED), 0),
    "p.tif": (pil(INDEXED), 0),
    "p-tifffile.tif": (tif(GREY, photometric="palette", colormap=MAP16), 0),
    "p-transparent.png": (pil(INDEXED, transparency=3), 0),
    "pa.tif": (pil(INDEXED.convert("PA")), 0),
    "rgb.png": (pil(PHOTO), 0),
    "rgb.jpg": (pil(PHOTO, quality=92), 0),
    "rgb-420.jpg": (pil(PHOTO, quality=80, subsampling=2, progressive=True), 0),
    "rgb.tif": (pil(PHOTO), 0),
    "rgb.bmp": (pil(PHOTO), 0),
    "rgb.ppm": (pil(PHOTO), 0),
    "rgb.tga": (pil(PHOTO), 0),
    "rgb.webp": (pil(PHOTO, lossless=True), 0),
    "rgb-lossy.webp": (pil(PHOTO, quality=70), 0),
    "rgb.jp2": (pil(PHOTO), 0),
    "rgb.avif": (pil(PHOTO, quality=90), 0),
    "rgb-libpng.png": (coded(lambda: imagecodecs.png_encode(ASTRONAUT)), 0),
    "rgb-transparent.png": (pil(PHOTO, transparency=(0, 0, 0)), 0),
    "rgb-planes.tif": (tif(PLANES, photometric="rgb", planarconfig="separate"), 0),
    "rgb-plane-tiles.tif": (
        tif(PLANES, photometric="rgb", planarconfig="separate", tile=(16, 32), compression="lzw"),
        0,
    ),
    "rgb-tiles.tif": (
        tif(ASTRONAUT, photometric="rgb", tile=(16, 16), compression="zlib", predictor=True),
        0,
    ),
    "rgb-strips.tif": (tif(ASTRONAUT, photometric="rgb", rowsperstrip=5, compression="lzw"), 0),
    "rgb-packbits.tif": (tif(ASTRONAUT, photometric="rgb", compression="packbits"), 0),
    "rgb-big.tif": (tif(ASTRONAUT, photometric="rgb", bigtiff=True), 0),
    "rgb-big-endian.tif": (tif(ASTRONAUT, photometric="rgb", byteorder=">"), 0),
    "rgb-jpeg.tif": (tif(ASTRONAUT, photometric="rgb", compression="jpeg", tile=(16, 16)), 4),
    "ycbcr-jpeg.tif": (pil(PHOTO, compression="jpeg", quality=90), 4),
    "ycbcr.tif": (pil(PHOTO.convert("YCbCr")), 0),
    "ycbcr.jpg": (pil(PHOTO.convert("YCbCr"), quality=90), 0),
    "rgba.png": (pil(TRANSPARENT), 0),
    "rgba.tif": (pil(TRANSPARENT), 0),
    "rgba.webp": (pil(TRANSPARENT, lossless=True, exact=True), 0),
    "rgba-multiplied.tif": (
        tif(premultiplied(np.uint8, 255).astype("u1"), photometric="rgb", extrasamples=["assocalpha"]),
        1,
    ),
    "cmyk.tif": (pil(PHOTO.convert("CMYK")), 1),
    "cmyk.jpg": (pil(PHOTO.convert("CMYK"), quality=95), 0),
    "cmyk-lzw.tif": (pil(PHOTO.convert("CMYK"), compression="tiff_lzw"), 1),
    "lab.tif": (lambda path: lab().save(path), 0),
    "sideways-6.jpg": (pil(PHOTO, quality=90, **turned(6)), 0),
    "sideways-8.png": (pil(PHOTO, **turned(8)), 0),
    "sideways-5.webp": (pil(PHOTO, lossless=True, **turned(5)), 0),
    "sideways-7.tif": (pil(PHOTO, tiffinfo={274: 7}), 0),
    "mirrored-2.tif": (tif(ASTRONAUT, photometric="rgb", extratags=[(274, 3, 1, 2, True)]), 0),
    "sideways-6-tiles.tif": (
        tif(ASTRONAUT, photometric="rgb", tile=(16, 16), extratags=[(274, 3, 1, 6, True)]),
        0,
    ),
    "sideways-p.png": (pil(INDEXED, **turned(3)), 0),
    "jpeg called.png": (pil(PHOTO, format="JPEG"), 0),
    "png called.tif": (pil(PHOTO, format="PNG"), 0),
    "tiff called.jpg": (pil(PHOTO, format="TIFF", compression="tiff_lzw"), 0),
    "phone.mpo": (pil(PHOTO, format="MPO", save_all=True, append_images=[PHOTO.resize((20, 30))]), 0),
}


@pytest.mark.parametrize("name", TABLE)
def test_read_as_pillow_shows_it(tmp_path, name):
    write, tolerance = TABLE[name]
    write(tmp_path / name)
    expected = shown(tmp_path / name).transpose(2, 0, 1)
    got = read_image(tmp_path / name, 3)
    assert got.shape == expected.shape and got.dtype == np.float32
    assert np.abs(got * 255 - expected).max() <= tolerance + 1e-3
    box = Box((7, 11), (40, 33))
    window = open_image(tmp_path / name, 3)[(slice(None), *box)]
    assert (window == got[(slice(None), *box)]).all()


DEEP_TABLE = {  # name -> (writer, what it shows of the photograph in 0..1: h w c)
    "rgb16.png": (coded(imagecodecs.png_encode(DEEP)), DEEP / 65535),
    "rgba16.png": (coded(imagecodecs.png_encode(np.dstack([DEEP, DEEP[..., :1]]))), DEEP / 65535),
    "l16.png": (pil(Image.fromarray(DEEP[..., 0])), DEEP[..., :1] / 65535),
    "la16.png": (coded(imagecodecs.png_encode(DEEP[..., :2].copy())), DEEP[..., :1] / 65535),
    "i16.tif": (pil(Image.fromarray(DEEP[..., 0])), DEEP[..., :1] / 65535),
    "i16b.tif": (tif(DEEP[..., 0], byteorder=">"), DEEP[..., :1] / 65535),
    "rgb16.tif": (tif(DEEP, photometric="rgb", compression="zlib", predictor=True), DEEP / 65535),
    "rgb16.jp2": (coded(lambda: imagecodecs.jpeg2k_encode(DEEP, level=0)), DEEP / 65535),
    "rgb16.jxl": (coded(lambda: imagecodecs.jpegxl_encode(DEEP, lossless=True)), DEEP / 65535),
    "rgb16.jxr": (coded(lambda: imagecodecs.jpegxr_encode(DEEP)), DEEP / 65535),
    "l16.jls": (coded(lambda: imagecodecs.jpegls_encode(DEEP[..., 0].copy())), DEEP[..., :1] / 65535),
    "rgb8.jls": (coded(lambda: imagecodecs.jpegls_encode(ASTRONAUT)), ASTRONAUT / 255),
    "lossless16.jpg": (
        coded(lambda: imagecodecs.jpeg_encode(DEEP[..., 0].copy(), bitspersample=16, lossless=True)),
        DEEP[..., :1] / 65535,
    ),
    "lossless12.jpg": (
        coded(lambda: imagecodecs.jpeg_encode(DEEP[..., 0] >> 4, bitspersample=12, lossless=True)),
        (DEEP[..., :1] >> 4) / 4095,
    ),
    "packed12.j2k": (
        coded(
            lambda: imagecodecs.jpeg2k_encode(DEEP[..., 0] >> 4, level=0, bitspersample=12, codecformat="j2k")
        ),
        (DEEP[..., :1] >> 4) / 4095,
    ),
    "l16.pgm": (pil(Image.fromarray(DEEP[..., 0])), DEEP[..., :1] / 65535),
    "float.tif": (tif((DEEP / 65535).astype("f4"), photometric="rgb"), DEEP / 65535),
    "half.tif": (tif((ASTRONAUT / 256).astype("f2"), photometric="rgb"), ASTRONAUT / 256),
    "double.tif": (tif(DEEP / 65535, photometric="rgb", predictor=3, compression="zlib"), DEEP / 65535),
    "packed12.tif": (tif(DEEP[..., 0] >> 4, bitspersample=12), (DEEP[..., :1] >> 4) / 4095),
    "packed10.tif": (tif(DEEP[..., 0] >> 6, bitspersample=10), (DEEP[..., :1] >> 6) / 1023),
    "packed4.tif": (tif(GREY >> 4, bitspersample=4), (GREY >> 4)[..., None] / 15),
    "says4095.tif": (
        tif(DEEP[..., 0] >> 4, extratags=[(281, 3, 1, 4095, True)]),
        (DEEP[..., :1] >> 4) / 4095,
    ),
    "says777.tif": (tif(DEEP[..., 0], extratags=[(281, 3, 1, 777, True)]), DEEP[..., :1] / 65535),
    "cmyk16.tif": (
        tif(np.dstack([65535 - DEEP, DEEP[..., 0] * 0]), photometric="separated"),
        DEEP / 65535,
    ),
    "white16.tif": (tif(65535 - DEEP[..., 0], photometric="miniswhite"), DEEP[..., :1] / 65535),
    "multiplied16.tif": (
        tif(premultiplied("u2", 65535).astype("u2"), photometric="rgb", extrasamples=["assocalpha"]),
        ASTRONAUT / 255,
    ),
    "nir.tif": (
        tif(np.dstack([ASTRONAUT, GREY]), photometric="rgb", extrasamples=["unspecified"]),
        np.dstack([ASTRONAUT, GREY]) / 255,
    ),
    "two bands.tif": (
        tif(ASTRONAUT[..., :2].copy(), planarconfig="contig", photometric="minisblack"),
        ASTRONAUT[..., :2] / 255,
    ),
    "thirteen.tif": (
        tif(np.dstack([DEEP] * 5)[..., :13], photometric="minisblack", planarconfig="contig"),
        np.dstack([DEEP] * 5)[..., :13] / 65535,
    ),
    "thirteen planes.tif": (
        tif(
            np.moveaxis(np.dstack([DEEP] * 5)[..., :13], -1, 0),
            photometric="minisblack",
            planarconfig="separate",
        ),
        np.dstack([DEEP] * 5)[..., :13] / 65535,
    ),
    "thirteen pages.tif": (
        tif(
            np.moveaxis(np.dstack([DEEP] * 5)[..., :13], -1, 0), photometric="minisblack", compression="zlib"
        ),
        np.dstack([DEEP] * 5)[..., :13] / 65535,
    ),
    "five last.tif": (tif(np.dstack([DEEP] * 2)[..., :5]), np.dstack([DEEP] * 2)[..., :5] / 65535),
    "three hundred.tif": (
        tif(np.dstack([DEEP] * 100), photometric="minisblack", planarconfig="contig"),
        np.dstack([DEEP] * 100) / 65535,
    ),
    "imagej channels.tif": (
        tif(np.moveaxis(DEEP, -1, 0), imagej=True, metadata=dict(axes="CYX")),
        DEEP / 65535,
    ),
    "channels.ome.tif": (tif(np.moveaxis(DEEP, -1, 0), metadata=dict(axes="CYX")), DEEP / 65535),
}


@pytest.mark.parametrize("name", DEEP_TABLE)
def test_read_as_it_was_written(tmp_path, name):
    "What Pillow cannot show: depths, bands, opacity that is none."
    write, expected = DEEP_TABLE[name]
    write(tmp_path / name)
    got = read_image(tmp_path / name)
    assert got.shape == (expected.shape[2], *expected.shape[:2])
    assert np.abs(got - expected.transpose(2, 0, 1)).max() <= (
        2e-3 if "jxr" in name or "half" in name else 1e-4
    )
    window = open_image(tmp_path / name)[:, 9:31, 3:40]
    assert (window == got[:, 9:31, 3:40]).all()


@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "late.png", "jpg", "webp", "tif", "tile.tif", "16.png", "mask.png"])
def test_orientations(tmp_path, n, kind):
    "All eight, of images and masks, in every format that notes one; in PNG also after the pixels."
    path = tmp_path / f"x.{kind}"
    if kind == "tif":
        PHOTO.save(path, tiffinfo={274: n})
    elif kind == "tile.tif":
        tifffile.imwrite(path, ASTRONAUT, photometric="rgb", tile=(16, 32), extratags=[(274, 3, 1, n, True)])
    elif kind in ("late.png", "16.png"):
        path.write_bytes(with_chunk(imagecodecs.png_encode(DEEP if kind == "16.png" else ASTRONAUT), n, kind))
    else:
        (INDEXED if kind == "mask.png" else PHOTO).save(path, **turned(n))
    one = Image.fromarray(np.arange(GREY.size, dtype=np.int32).reshape(GREY.shape))
    one.getexif()[0x0112] = n
    order = np.asarray(ImageOps.exif_transpose(one))
    plain = np.asarray(INDEXED) if kind == "mask.png" else DEEP if kind == "16.png" else ASTRONAUT
    got = read_pixels(path)
    assert got.shape[:2] == order.shape
    expected = plain.reshape(GREY.size, -1)[order].reshape(got.shape)
    if kind in ("jpg", "webp"):
        expected = shown(path)
    assert (got == expected).all()


def with_chunk(png, n, kind):
    "A PNG with eXIf before or after its pixels."
    body = turned(n)["exif"].tobytes().removeprefix(b"Exif\0\0")
    chunk = len(body).to_bytes(4, "big") + b"eXIf" + body
    chunk += zlib.crc32(chunk[4:]).to_bytes(4, "big")
    at = len(png) - 12 if kind == "late.png" else 33
    return png[:at] + chunk + png[at:]


def chunk(name, body):
    data = name + body
    return len(body).to_bytes(4, "big") + data + zlib.crc32(data).to_bytes(4, "big")


@pytest.mark.parametrize("stored,white", [("raw", 4095), ("shifted", 65535), ("repeated", 65535)])
@pytest.mark.parametrize("channels", [1, 3])
def test_twelve_bits_in_a_png(tmp_path, stored, white, channels):
    "The numbers of the sensor, or stretched as the standard says: the image is the same."
    sensor = (DEEP[..., :channels] >> 4).copy()
    kept = dict(raw=sensor, shifted=sensor << 4, repeated=sensor << 4 | sensor >> 8)[stored]
    png = imagecodecs.png_encode(np.ascontiguousarray(kept.squeeze()))
    (tmp_path / "x.png").write_bytes(png[:33] + chunk(b"sBIT", bytes([12] * channels)) + png[33:])
    got = read_image(tmp_path / "x.png")
    assert np.abs(got - sensor.transpose(2, 0, 1) / 4095).max() < 3e-4
    (tmp_path / "plain.png").write_bytes(png)
    assert np.abs(read_image(tmp_path / "plain.png") - kept.transpose(2, 0, 1) / 65535).max() < 1e-6


def test_masks_keep_what_the_file_holds(tmp_path):
    "Indices of palettes, values of ink, one bit as it is shown."
    labels = (GREY // 40).astype(np.uint8)
    palette = Image.fromarray(labels).convert("P")
    palette.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200] + [9] * 759)
    palette.save(tmp_path / "p.png")
    palette.save(tmp_path / "p.tif")
    tifffile.imwrite(tmp_path / "ink.tif", labels, photometric="miniswhite")
    for name in ("p.png", "p.tif", "ink.tif"):
        assert (read_pixels(tmp_path / name) == labels).all()
    assert read_pixels(tmp_path / "p.tif", indexed=False)[labels == 1].tolist()[0] == [0, 200, 0]
    assert open_raster(tmp_path / "p.png", indexed=True).palette[:2].tolist() == [[200, 0, 0], [0, 200, 0]]
    for name, photometric in (("b.tif", "minisblack"), ("w.tif", "miniswhite")):
        tifffile.imwrite(tmp_path / name, BITS, photometric=photometric)
        assert (read_pixels(tmp_path / name) == (shown(tmp_path / name)[..., 0] > 0)).all()


def pages(sizes, **first):
    "A TIFF of several pages."

    def write(path):
        with tifffile.TiffWriter(path) as f:
            for i, size in enumerate(sizes):
                page = np.asarray(PHOTO.resize(size))
                f.write(page, photometric="rgb", metadata=None, **(first if i == 0 else {}))

    return write


def test_pyramids_give_the_largest(tmp_path):
    "Sub-images, reduced pages as in cloud-optimised files, and thumbnails without a note; a mask page is none of them."
    with tifffile.TiffWriter(tmp_path / "sub.tif") as f:
        f.write(ASTRONAUT, photometric="rgb", subifds=1, metadata=None)
        f.write(ASTRONAUT[::2, ::2], photometric="rgb", subfiletype=1, metadata=None)
    with tifffile.TiffWriter(tmp_path / "cog.tif") as f:
        f.write(ASTRONAUT, photometric="rgb", metadata=None)
        f.write(BITS, subfiletype=4, photometric=4, metadata=None)
        for step in (2, 4):
            f.write(ASTRONAUT[::step, ::step].copy(), photometric="rgb", subfiletype=1, metadata=None)
    pages([(47, 65), (12, 16)])(tmp_path / "thumbnail.tif")
    with tifffile.TiffWriter(tmp_path / "levels.ome.tif") as f:
        f.write(ASTRONAUT, photometric="rgb", subifds=2)
        for step in (2, 4):
            f.write(ASTRONAUT[::step, ::step].copy(), photometric="rgb", subfiletype=1)
    for name in ("sub.tif", "cog.tif", "thumbnail.tif", "levels.ome.tif"):
        assert (read_pixels(tmp_path / name) == ASTRONAUT).all(), name
    image, measured = open_image(tmp_path / "cog.tif").read()
    assert (measured == BITS).all() and not image[:, ~BITS].any()


FRAMES = [GRAY, GRAY.rotate(180), GRAY.point(lambda v: 255 - v)]
SEVERAL = {
    "film.gif": (pil(GRAY, save_all=True, append_images=FRAMES[1:]), "an animation .GIF. of 3 frames"),
    "film.png": (pil(GRAY, save_all=True, append_images=FRAMES[1:]), "an animation .PNG. of 3 frames"),
    "film.webp": (
        pil(GRAY, save_all=True, append_images=FRAMES[1:], lossless=True),
        "an animation .WEBP. of 3 frames",
    ),
    "pages.tif": (pil(GRAY, save_all=True, append_images=FRAMES[1:]), "3 pages"),
    "sizes.tif": (pages([(40, 30), (30, 40), (20, 20)]), "3 pages"),
    "z.tif": (
        tif(np.stack([GREY] * 5), imagej=True, metadata=dict(axes="ZYX")),
        "5 pages .slices of a volume.: ",
    ),
    "t.ome.tif": (tif(np.stack([GREY] * 5), metadata=dict(axes="TYX")), "5 pages .points in time."),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_several_images_are_refused(tmp_path, name):
    write, said = SEVERAL[name]
    write(tmp_path / name)
    with pytest.raises(InputError, match=f"{said}.*page=0") as e:
        read_image(tmp_path / name)
    assert "\n" not in str(e.value)
    assert read_image(tmp_path / name, page=1).ndim == 3
    with pytest.raises(InputError, match="expected page from 0 to"):
        read_image(tmp_path / name, page=99)


def test_a_frame_that_is_named(tmp_path):
    for name in ("film.gif", "film.webp", "pages.tif"):
        SEVERAL[name][0](tmp_path / name)
        got = read_image(tmp_path / name, 3, page=2)[0] * 255
        assert np.abs(got - np.asarray(FRAMES[2])).max() < 1e-3


@pytest.mark.parametrize(
    "name",
    [
        "rgb.png",
        "rgb.jpg",
        "rgb-strips.tif",
        "rgb.tif",
        "rgb-jpeg.tif",
        "rgb.webp",
        "rgb.jp2",
        "rgb.bmp",
        "p.gif",
        "rgb.ppm",
        "rgb-tiles.tif",
        "rgb16.png",
    ],
)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_truncated_files(tmp_path, name, share):
    "Cut anywhere: one line, never half an image."
    (TABLE.get(name) or DEEP_TABLE[name])[0](tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(InputError, match="cannot be read|cut short") as e:
        read_image(tmp_path / name)
    assert "\n" not in str(e.value) and name in str(e.value)


NOT_IMAGES = {
    "x.pdf": (b"%PDF-1.7 ...", "is PDF, no image"),
    "x.png": (b"", "empty"),
    "y.png": (b"hello", "format is not known"),
    "x.npy": (b"\x93NUMPY\1\0", "a NumPy array"),
    "x.tif": (b"II*\0", "cannot be read"),
    "x.html": (b"<!DOCTYPE html><title>404</title>", "format is not known"),
}


@pytest.mark.parametrize("name", NOT_IMAGES)
def test_what_is_no_image(tmp_path, name):
    data, said = NOT_IMAGES[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=said) as e:
        read_image(tmp_path / name)
    assert "\n" not in str(e.value)


def test_heif_names_its_package(tmp_path, monkeypatch):
    import dinolab.data.pixels as pixels

    (tmp_path / "x.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    monkeypatch.setattr(pixels, "_heif", lambda: False)
    with pytest.raises(InputError, match="is HEIF: .*pip install pillow-heif"):
        read_image(tmp_path / "x.heic")


def test_heif(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(PHOTO).save(tmp_path / "x.heic", quality=-1, chroma=444)
    assert np.abs(read_image(tmp_path / "x.heic") * 255 - ASTRONAUT.transpose(2, 0, 1)).mean() < 3


@pytest.mark.parametrize(
    "array",
    [
        np.array([[-1, 5]], np.int16),
        np.array([[0, 4000]], np.uint32),
        np.array([[0, 70000]], np.int32),
        np.array([[0, 2.0**40]], np.float64),
        np.array([[-0.5, 1]], np.float32),
    ],
)
def test_numbers_without_a_white(tmp_path, array):
    "Refused with their range; a range of their own makes 0 and 1 of the ends."
    tifffile.imwrite(tmp_path / "x.tif", array)
    with pytest.raises(InputError, match="from .* to .*: expected .*; give white=.*scaling=percentile"):
        read_image(tmp_path / "x.tif")
    low, high = map(float, array[0])
    assert read_image(tmp_path / "x.tif", white=Range((low,), (high,)))[0].tolist() == [[0, 1]]
    with pytest.raises(InputError, match="2 bands|1 bands"):
        read_image(tmp_path / "x.tif", white=Range((0, 0), (1, 1)))


@pytest.mark.parametrize("beyond,expected", [("clip", [0, 0.5, 1]), ("keep", [-1, 0.5, 2])])
def test_beyond_a_range(tmp_path, beyond, expected):
    tifffile.imwrite(tmp_path / "x.tif", np.array([[-10, 5, 20]], np.int16))
    assert read_image(tmp_path / "x.tif", white=Range((0,), (10,), beyond)).ravel().tolist() == expected


@pytest.mark.parametrize("hole", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("white", [None, 5, Range((0,), (1,), "clip"), Range((0,), (1,), "keep")])
def test_holes_are_refused(tmp_path, hole, white):
    array = np.zeros((9, 9), np.float32)
    array[4, 4] = hole
    tifffile.imwrite(tmp_path / "x.tif", array)
    image = OpenImage(tmp_path / "x.tif", white=white)
    for call in (image.read, image.check):
        with pytest.raises(InputError, match="not finite"):
            call()
    assert not image[:, :4].any()  # a window that is whole can be read


@pytest.mark.parametrize("nodata,dtype", [(-9999, "f4"), ("nan", "f4"), (0, "u2"), (-32768, "i2")])
def test_nodata_counts_nowhere(tmp_path, nodata, dtype):
    rasterio = pytest.importorskip("rasterio")
    from rasterio.transform import from_origin

    values = np.stack([DEEP[..., 0] // 4 + 1] * 2).astype(dtype)
    values[:, 10:20, 5:9] = float(nodata) if dtype == "f4" else nodata
    options = dict(driver="GTiff", height=65, width=47, count=2, dtype=values.dtype, nodata=float(nodata))
    with rasterio.open(
        tmp_path / "x.tif", "w", crs="EPSG:32633", transform=from_origin(0, 0, 1, 1), **options
    ) as f:
        f.write(values)
    image, measured = open_image(tmp_path / "x.tif", white=65535).read()
    with rasterio.open(tmp_path / "x.tif") as f:
        assert (measured == (f.dataset_mask() > 0)).all()
    assert not image[:, ~measured].any() and image[:, measured].min() > 0


def test_names_in_both_forms_of_unicode(tmp_path):
    for there, asked in (("NFC", "NFD"), ("NFD", "NFC")):
        folder = tmp_path / unicodedata.normalize(there, f"Bäume{there}")
        folder.mkdir()
        PHOTO.save(folder / unicodedata.normalize(there, "Ähre é.png"))
        other = (
            tmp_path
            / unicodedata.normalize(asked, f"Bäume{there}")
            / unicodedata.normalize(asked, "Ähre é.png")
        )
        assert read_image(other).shape == (3, 65, 47)
    with pytest.raises(InputError, match="no image"):
        read_image(tmp_path / "é.png")


def test_size_alone_is_no_reason(tmp_path):
    "13,500 x 13,500, beyond Pillow's limit, which stays as it was for others."
    limit = Image.MAX_IMAGE_PIXELS
    rows = zlib.compress(bytes(13501) * 13500, 1)
    header = (13500).to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    (tmp_path / "x.png").write_bytes(png)
    image = open_image(tmp_path / "x.png")
    assert image.shape == (1, 13500, 13500) and not image[:, -5:, -5:].any()
    assert Image.MAX_IMAGE_PIXELS == limit
    with pytest.raises(Image.DecompressionBombError):
        Image.open(tmp_path / "x.png")


@pytest.mark.parametrize(
    "key",
    [np.s_[:, 3:9, 5:], np.s_[0], np.s_[..., 4], np.s_[1, 2, 3], np.s_[:, 9:3], np.s_[:, ::3, 2:40:5], ...],
)
def test_sliced_like_an_array(tmp_path, key):
    TABLE["sideways-6-tiles.tif"][0](tmp_path / "x.tif")
    image = open_image(tmp_path / "x.tif")
    assert (image[key] == np.asarray(image)[key]).all() and image[key].shape == np.asarray(image)[key].shape


def test_only_what_a_window_touches_is_read(tmp_path):
    "The other tiles are damaged, and nobody notices."
    tifffile.imwrite(tmp_path / "x.tif", ASTRONAUT, photometric="rgb", tile=(16, 16), compression="zlib")
    with tifffile.TiffFile(tmp_path / "x.tif") as f:
        places = list(zip(f.pages[0].dataoffsets, f.pages[0].databytecounts))
    data = bytearray((tmp_path / "x.tif").read_bytes())
    for at, count in places[1:]:
        data[at : at + count] = bytes(count)
    (tmp_path / "x.tif").write_bytes(data)
    image = open_image(tmp_path / "x.tif")
    assert (image[:, :16, :16] * 255 == ASTRONAUT[:16, :16].transpose(2, 0, 1)).all()
    with pytest.raises(InputError, match="cannot be read"):
        image.read()
