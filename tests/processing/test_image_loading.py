"""Pictures of every kind, good and bad."""

import base64
import io
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from transformers import BitImageProcessorPil, CLIPImageProcessorPil, SiglipImageProcessorPil
from transformers.image_utils import load_image as fetch_image

from helpers.tiny import make_processor, text_part
from modeling_visualchat.image_loading_visualchat import clip_pixel_values, clip_side, crop_for_clip, load_image


PHOTOGRAPH = Image.fromarray(load_sample_image("china.jpg")[:60, :80])


def encode(image: Image.Image, kind: str, **kwargs) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **kwargs)
    return buffer.getvalue()


class TestSources:
    @pytest.fixture
    def png(self):
        return encode(PHOTOGRAPH, "PNG")

    @pytest.mark.parametrize(
        "kind", ["bytes", "str", "Path", "data URL", "base64", "PIL", "array", "tensor", "floats", "CHW"]
    )
    def test_every_source_gives_the_same_picture(self, kind, png, tmp_path):
        path = tmp_path / "a.png"
        path.write_bytes(png)
        array = np.asarray(PHOTOGRAPH)
        source = {
            "bytes": png,
            "str": str(path),
            "Path": path,
            "data URL": "data:image/png;base64," + base64.b64encode(png).decode(),
            "base64": base64.b64encode(png).decode(),
            "PIL": PHOTOGRAPH,
            "array": array,
            "tensor": torch.from_numpy(array.copy()),
            "floats": array / 255,
            "CHW": np.moveaxis(array, -1, 0),
        }[kind]
        assert np.array_equal(load_image(source), array)

    @pytest.mark.parametrize("scheme", ["https", "HTTPS"])
    def test_an_http_url(self, scheme, monkeypatch):
        pictures = {"https://example.com/a.png": PHOTOGRAPH}
        monkeypatch.setattr("modeling_visualchat.image_loading_visualchat.fetch_image", pictures.__getitem__)
        assert np.array_equal(load_image(f"{scheme}://example.com/a.png"), PHOTOGRAPH)

    def test_a_url_that_fails_is_named(self):
        with pytest.raises(ValueError, match=r"image 2: cannot fetch http://127.0.0.1:9/a.png"):
            load_image("http://127.0.0.1:9/a.png", name="image 2")

    @pytest.mark.parametrize("make", ["{}", "data:image/png;base64,{}", "DATA:Image/PNG;BASE64,{}", "data:,{}"])
    @pytest.mark.parametrize("wrap", [base64.encodebytes, base64.b64encode], ids=["lines", "one line"])
    def test_base64_as_mail_and_pages_write_it(self, make, wrap, png):
        assert np.array_equal(load_image(make.format(wrap(png).decode())), PHOTOGRAPH)

    def test_base64_shorter_than_a_path(self):
        text = base64.b64encode(encode(Image.new("RGB", (1, 1), "red"), "PNG")).decode()
        assert len(text) < 255
        assert np.array_equal(load_image(text), load_image("data:image/png;base64," + text))
        assert np.array_equal(load_image(text), [[[255, 0, 0]]])
        assert np.array_equal(load_image(text), fetch_image(text))  # as transformers takes it

    def test_file_urls_and_the_home_directory(self, png, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        path = tmp_path / "näch & 100%25.png"
        path.write_bytes(png)
        for source in (
            path.as_uri(),
            path.as_uri().replace("file://", "FILE://localhost"),
            "~/" + path.name,
            Path("~") / path.name,
        ):
            assert np.array_equal(load_image(source), PHOTOGRAPH), source

    def test_a_file_whose_name_looks_like_something_else(self, png, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name in ("~", "data:image", "QUFB"):
            Path(name).write_bytes(png)
            assert np.array_equal(load_image(name), PHOTOGRAPH), name

    @pytest.mark.parametrize(
        ("source", "error", "message"),
        [
            ("file:///nowhere.png", FileNotFoundError, "image 1: there is no file /nowhere.png"),
            ("file://server/share/a.png", ValueError, "image 1: file://server/share/a.png is not a file of this machine"),
            ("file://", ValueError, "image 1: file:// is not a file of this machine"),
            ("s3://bucket/a.png", ValueError, "image 1: s3://bucket/a.png: nothing is read from s3 URLs"),
            ("~/nowhere.png", FileNotFoundError, "image 1: there is no file {home}/nowhere.png"),
            ("nowhere", FileNotFoundError, "image 1: there is no file nowhere"),  # valid base64, but of no picture
        ],
    )
    def test_what_is_not_read_is_named(self, source, error, message, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        with pytest.raises(error, match=re.escape(message.format(home=tmp_path))):
            load_image(source, "image 1")


class TestArrays:
    CHW = torch.from_numpy(np.moveaxis(np.asarray(PHOTOGRAPH), -1, 0).copy())

    @pytest.mark.parametrize(
        ("dtype", "bits"), [(torch.bfloat16, 7), (torch.float16, 8), (torch.float32, 8), (torch.float64, 8)], ids=str
    )
    def test_tensors_of_any_float(self, dtype, bits):
        loaded = np.asarray(load_image((self.CHW.double() / 255).to(dtype))).astype(int)
        assert np.abs(loaded - np.asarray(PHOTOGRAPH)).max() <= (2 ** (8 - bits)) - 1

    def test_a_tensor_that_requires_grad(self):
        tensor = (self.CHW / 255).requires_grad_()
        assert np.array_equal(load_image(tensor), PHOTOGRAPH)
        assert np.array_equal(load_image(tensor * 1), PHOTOGRAPH)

    @pytest.mark.parametrize("make", [lambda one: one[None], lambda one: one.permute(1, 2, 0).numpy()[None]])
    def test_a_batch_of_one(self, make):
        assert np.array_equal(load_image(make(self.CHW)), PHOTOGRAPH)

    def test_a_batch_of_several(self):
        processor = make_processor()
        batch = torch.stack([self.CHW, 255 - self.CHW])
        expected = processor(images=list(batch), return_tensors="pt")["pixel_values"]
        assert torch.equal(processor(images=batch, return_tensors="pt")["pixel_values"], expected)
        with pytest.raises(ValueError, match=r"got \(2, 3, 60, 80\); give the images of a batch one by one"):
            load_image(batch)
        content = [{"type": "image", "image": batch[:1]}, text_part("What?")]
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options)
        assert torch.equal(inputs["pixel_values"], expected[:1])

    @pytest.mark.parametrize(
        ("shape", "of_tensor", "of_array"),
        [
            ((3, 200, 1), (1, 200), (200, 3)),  # width and height
            ((3, 200, 3), (3, 200), (200, 3)),
            ((1, 200, 4), (4, 200), (200, 1)),
            ((4, 5, 3), (3, 5), (5, 4)),
            ((3, 200, 2), (2, 200), (2, 200)),  # where one order fits alone, it is taken
            ((2, 200, 3), (200, 2), (200, 2)),
        ],
    )
    def test_the_order_of_the_axes_where_both_fit(self, shape, of_tensor, of_array):
        array = np.zeros(shape, dtype=np.uint8)
        assert load_image(torch.from_numpy(array)).size == of_tensor
        assert load_image(array).size == of_array
        assert load_image(torch.from_numpy(array)[None]).size == of_tensor

    def test_an_image_one_pixel_wide(self):
        column = self.CHW[:, :, :1]
        assert np.array_equal(load_image(column), PHOTOGRAPH.crop((0, 0, 1, 60)))
        assert np.array_equal(load_image(column.permute(1, 2, 0).numpy()), PHOTOGRAPH.crop((0, 0, 1, 60)))


class TestModes:
    def test_grayscale(self):
        gray = PHOTOGRAPH.convert("L")
        assert np.array_equal(load_image(encode(gray, "PNG")), np.stack([np.asarray(gray)] * 3, axis=-1))

    def test_black_and_white(self):
        image = load_image(Image.fromarray(np.array([[True, False]])))
        assert np.asarray(image)[0, :, 0].tolist() == [255, 0]

    def test_palette(self):
        palette = PHOTOGRAPH.convert("P")
        assert np.array_equal(load_image(encode(palette, "GIF")), palette.convert("RGB"))

    @pytest.mark.parametrize("mode", ["RGBA", "LA"])
    def test_transparency_is_laid_on_white(self, mode):
        image = Image.new(mode, (2, 1), 0)
        opaque = (0, 0, 0, 255) if mode == "RGBA" else (0, 255)
        image.putpixel((1, 0), opaque)
        assert np.asarray(load_image(encode(image, "PNG")))[0].tolist() == [[255] * 3, [0] * 3]

    def test_a_transparent_palette_is_laid_on_white(self):
        image = Image.new("P", (2, 1), 0)
        image.putpalette([10, 20, 30, 40, 50, 60])
        image.putpixel((1, 0), 1)
        loaded = load_image(encode(image, "PNG", transparency=0))
        assert np.asarray(loaded)[0].tolist() == [[255] * 3, [40, 50, 60]]

    def test_16_bit_is_scaled_not_clipped(self):
        ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None]
        loaded = np.asarray(load_image(encode(Image.fromarray(ramp), "PNG")))
        assert np.array_equal(loaded[0, :, 0], np.arange(256))
        assert np.array_equal(np.asarray(load_image(ramp))[0, :, 0], np.arange(256))

    def test_floating_point_tiff(self):
        loaded = load_image(encode(Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32)), "TIFF"))
        assert np.asarray(loaded)[0, :, 0].tolist() == [0, 128, 255]

    def test_cmyk(self):
        cmyk = PHOTOGRAPH.convert("CMYK")
        loaded = np.asarray(load_image(encode(cmyk, "TIFF"))).astype(int)
        assert np.abs(loaded - np.asarray(PHOTOGRAPH)).mean() < 1

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif_rotation_is_applied(self, orientation):
        exif = Image.Exif()
        exif[0x0112] = orientation
        turn = {
            1: None,
            2: Image.Transpose.FLIP_LEFT_RIGHT,
            3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_270,
            7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_90,
        }[orientation]
        upright = PHOTOGRAPH if turn is None else PHOTOGRAPH.transpose(turn)
        assert np.array_equal(load_image(encode(PHOTOGRAPH, "PNG", exif=exif)), upright)


class TestBadPictures:
    def test_a_missing_file(self):
        with pytest.raises(FileNotFoundError, match=r"image 1: there is no file nowhere\.png"):
            load_image("nowhere.png", name="image 1")

    def test_an_empty_file(self, tmp_path):
        path = tmp_path / "empty.png"
        path.touch()
        with pytest.raises(ValueError, match=r"empty\.png is empty"):
            load_image(path)
        with pytest.raises(ValueError, match="0 bytes: the image is empty"):
            load_image(b"")

    def test_not_a_picture(self, tmp_path):
        path = tmp_path / "text.png"
        path.write_text("hello")
        with pytest.raises(ValueError, match=r"text\.png is not an image that Pillow can read"):
            load_image(path)

    @pytest.mark.parametrize("kind", ["PNG", "JPEG"])
    def test_a_truncated_picture(self, kind, tmp_path):
        path = tmp_path / "half"
        data = encode(PHOTOGRAPH, kind)
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(ValueError, match="half is a broken image"):
            load_image(path)

    @pytest.mark.parametrize("source", [Image.new("RGB", (0, 5)), np.zeros((0, 5, 3), dtype=np.uint8)], ids=["PIL", "array"])
    def test_no_pixels(self, source):
        with pytest.raises(ValueError, match="the image has no pixels"):
            load_image(source)

    @pytest.mark.parametrize("limit", [4000, 2000])  # Pillow warns above the limit and raises above twice the limit
    def test_over_pillows_decompression_limit(self, limit, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(ValueError, match=rf"exceeds Pillow's limit of {limit} pixels"):
                load_image(encode(PHOTOGRAPH, "PNG"))

    def test_arrays_that_are_no_pictures(self):
        with pytest.raises(ValueError, match=r"must have the shape .* got \(2, 2, 2\)"):
            load_image(np.zeros((2, 2, 2)))
        with pytest.raises(ValueError, match="floats must lie between 0 and 1, got 0 to 255"):
            load_image(np.array([[0.0, 255.0]]))
        with pytest.raises(ValueError, match="integers must lie between 0 and 255, got -1 to 3"):
            load_image(np.array([[-1, 3]]))

    def test_other_types(self):
        with pytest.raises(TypeError, match="expected a path, URL, bytes, PIL image or array, got int"):
            load_image(3)

    def test_the_processor_names_the_image(self, tmp_path):
        processor = make_processor()
        (tmp_path / "bad.png").write_text("x")
        content = [
            {"type": "image", "image": PHOTOGRAPH},
            {"type": "image", "path": str(tmp_path / "bad.png")},
            text_part("What?"),
        ]
        with pytest.raises(ValueError, match=r"image 2: .*bad\.png is not an image"):
            processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True, return_dict=True)


class TestPixelValues:
    """What we compute for CLIP's image processor is what it computes, to the bit."""

    SIDE = 32
    SIZES = {"shortest edge": {"shortest_edge": SIDE}, "both edges": {"height": SIDE, "width": SIDE}}

    @staticmethod
    def image_processor(**options):
        side = TestPixelValues.SIDE
        options = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}, **options}
        return CLIPImageProcessorPil(**options)

    @pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
    @pytest.mark.parametrize("resample", Image.Resampling)
    def test_pictures_of_any_size(self, size, resample):
        image_processor = self.image_processor(size=size, resample=resample)
        photograph = Image.fromarray(load_sample_image("flower.jpg"))
        edges = (1, 7, 31, 32, 33, 64, 97, 211, 400)
        pictures = [photograph.crop((150, 20, 150 + width, 20 + height)) for width in edges for height in edges]
        expected = image_processor(pictures, return_tensors="pt")["pixel_values"]
        assert torch.equal(clip_pixel_values(pictures, image_processor), expected)
        cropped = [crop_for_clip(picture, image_processor) for picture in pictures]
        assert {picture.size for picture in cropped} == {(self.SIDE, self.SIDE)}
        assert torch.equal(image_processor(cropped, return_tensors="pt")["pixel_values"], expected)

    @pytest.mark.parametrize("size", [32, 38, 64])
    def test_the_image_processors_of_siglip_and_dino(self, size):
        bit = BitImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": 32, "width": 32})
        siglip = SiglipImageProcessorPil(size={"height": size, "width": size}, resample=Image.Resampling.BILINEAR)
        photograph = Image.fromarray(load_sample_image("flower.jpg"))
        edges = (1, 31, 32, 33, 38, 39, 64, 97, 211, 400)
        pictures = [photograph.crop((150, 20, 150 + width, 20 + height)) for width in edges for height in edges]
        for image_processor in (bit, siglip):
            assert clip_side(image_processor) == size
            expected = image_processor(pictures, return_tensors="pt")["pixel_values"]
            assert torch.equal(clip_pixel_values(pictures, image_processor), expected)
            cropped = [crop_for_clip(picture, image_processor) for picture in pictures]
            assert {picture.size for picture in cropped} == {(size, size)}
            assert torch.equal(image_processor(cropped, return_tensors="pt")["pixel_values"], expected)
            assert torch.equal(clip_pixel_values(cropped, image_processor), expected)

    @pytest.mark.parametrize(
        "image_processor",
        [
            BitImageProcessorPil(size={"shortest_edge": 35}, crop_size={"height": 32, "width": 32}),
            BitImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 32, "width": 32}),
            BitImageProcessorPil(size={"shortest_edge": 32}, do_center_crop=False),
            BitImageProcessorPil(size={"height": 40, "width": 40}, crop_size={"height": 32, "width": 32}),
            SiglipImageProcessorPil(size={"height": 32, "width": 40}),
            SiglipImageProcessorPil(size={"shortest_edge": 32}),
            SiglipImageProcessorPil(do_center_crop=True, crop_size={"height": 32, "width": 32}),
        ],
    )
    def test_their_other_steps_are_left_to_them(self, image_processor):
        assert clip_side(image_processor) is None
        assert crop_for_clip(PHOTOGRAPH, image_processor) is PHOTOGRAPH

    def test_other_means_and_scales(self):
        image_processor = self.image_processor(image_mean=[0.1, 0.2, 0.3], image_std=0.7, rescale_factor=1 / 127)
        expected = image_processor([PHOTOGRAPH], return_tensors="pt")["pixel_values"]
        assert torch.equal(clip_pixel_values([PHOTOGRAPH], image_processor), expected)

    @pytest.mark.parametrize(
        "options",
        [
            {"do_resize": False},
            {"do_center_crop": False, "size": {"height": 32, "width": 32}},
            {"do_rescale": False},
            {"do_normalize": False},
            {"do_pad": True, "pad_size": {"height": 40, "width": 40}},
            {"size": {"shortest_edge": 20}},
            {"size": {"shortest_edge": 48}},
            {"size": {"height": 32, "width": 40}},
            {"size": {"shortest_edge": 32, "longest_edge": 36}},
            {"crop_size": {"height": 32, "width": 30}},
        ],
        ids=str,
    )
    def test_other_steps_are_left_to_the_image_processor(self, options):
        processor = make_processor()
        processor.image_processor = self.image_processor(**options)
        assert clip_side(processor.image_processor) is None
        assert crop_for_clip(PHOTOGRAPH, processor.image_processor) is PHOTOGRAPH
        values = processor(text="<image>", images=[PHOTOGRAPH], return_tensors="pt")["pixel_values"]
        assert torch.equal(values, processor.image_processor([PHOTOGRAPH], return_tensors="pt")["pixel_values"])

    def test_other_image_processors_are_left_alone(self):
        class Inverted(CLIPImageProcessorPil):
            def rescale(self, image, scale, **kwargs):
                return super().rescale(255 - image, scale, **kwargs)

        assert clip_side(self.image_processor()) == self.SIDE
        assert clip_side(Inverted(**self.image_processor().to_dict())) is None

    def test_a_picture_too_thin_to_be_resized_is_refused_before_it_takes_memory(self):
        thread = Image.new("RGB", (4_000_000, 1))
        with pytest.raises(ValueError, match="4000000×1 pixels is too thin"):
            crop_for_clip(thread, self.image_processor())

    def test_other_steps_resize_thin_pictures_too(self):
        thread = Image.new("RGB", (4_000_000, 1))
        for options in ({"size": {"shortest_edge": 48}}, {"do_center_crop": False}):
            with pytest.raises(ValueError, match="4000000×1 pixels is too thin"):
                crop_for_clip(thread, self.image_processor(**options))
        for options in ({"size": {"height": 32, "width": 32}}, {"size": {"shortest_edge": 32, "longest_edge": 36}}):
            assert crop_for_clip(thread, self.image_processor(**options)).width in (32, thread.width)

    def test_text_that_is_no_base64_at_all_is_named(self):
        with pytest.raises(ValueError, match="image 3: neither a path nor valid base64"):
            load_image("data:image/png;base64,häuser", "image 3")
