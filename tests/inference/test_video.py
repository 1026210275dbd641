"""Answers about videos are those about their frames, one tile each (design: data.md 3)."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image
from tiny_videos import gif, gray, numbers, video

from internvlx_jax.core.errors import SampleError
from internvlx_jax.data.images import load_image
from internvlx_jax.inference.batches import count_tiles
from internvlx_jax.inference.requests import Tiler

OPTIONS = {"max_new_tokens": 6}
MIDDLES = [2, 8, 14, 20]  # of four equal parts of 24 frames, (low + high - 1) // 2


@pytest.fixture(scope="module")
def mp4() -> bytes:
    return video()


@pytest.fixture(scope="module")
def wanted(model, mp4) -> str:
    """The answer about the four frames as images, with the text that announces them."""
    frames = model.video_frames(mp4, 4)
    assert numbers(load_image(frame) for frame in frames) == MIDDLES
    text = "".join(f"Frame{i}: <image>\n" for i in range(1, 5)) + "What happens?"
    return model.generate(text, list(frames), **OPTIONS)


def test_every_kind_of_video(model, mp4, wanted, tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(mp4)

    def answer(given, prompt="What happens?"):
        return model.generate(prompt, video=given, frames=4, **OPTIONS)

    assert answer(path) == answer(str(path)) == answer(mp4) == wanted
    assert answer(mp4, "<video>\nWhat happens?") == wanted
    assert answer(mp4, "What happens? <video>") != wanted
    folder = tmp_path / "frames"
    folder.mkdir()
    for i in range(24):
        Image.fromarray(gray(i)).save(folder / f"f_{i}.png")
    pixels = np.stack([gray(i) for i in range(24)])
    exact = answer(pixels)
    assert exact == answer(folder) == answer([Image.fromarray(each) for each in pixels])
    assert exact == answer(gif())
    assert "".join(model.stream("What happens?", video=mp4, frames=4, **OPTIONS)) == wanted
    page = np.zeros((9, 9, 3), np.uint8)
    together = model.generate(
        ["What happens?", "This?", "That?"],
        [None, page, None],
        video=[mp4, None, None],
        frames=4,
        **OPTIONS,
    )
    assert together[0] == wanted and together[1] == model.generate("This?", page, **OPTIONS)


def test_a_chat_about_a_video(model, mp4, wanted):
    chat = model.chat(**OPTIONS)
    assert chat.send("What happens?", video=mp4, frames=4) == wanted
    assert [len(image.data) for image in chat.history[0].images] == [56 * 56 * 3 + 13] * 4
    again = chat.send("And then?")
    assert again == model.generate("And then?", history=chat.history[:1], **OPTIONS)
    assert chat.send("Another?", np.zeros((9, 9, 3), np.uint8)) is not None


def test_a_frame_is_one_tile_whatever_the_rule(model, mp4):
    frames = model.video_frames(mp4, 3)
    for rule in ("edge", "area", "off"):
        tiles = dataclasses.replace(
            model.config.prompt.tiles, dynamic=True, rule=rule, max_num=12, tile_size=28
        )
        page = io.BytesIO()
        Image.new("RGB", (112, 56)).save(page, "PNG")
        assert count_tiles(Tiler(tiles), frames) == (1, 1, 1)
        alone = count_tiles(Tiler(tiles), [page.getvalue()])
        assert count_tiles(Tiler(tiles), [page.getvalue(), *frames]) == (*alone, 1, 1, 1)


def test_images_beside_a_video(model, mp4, pixels):
    """They stand where the prompt says, else in front: images, then the video, then the text."""
    frames = list(model.video_frames(mp4, 2))
    shown = "Frame1: <image>\nFrame2: <image>\n"
    both = {"images": [pixels], "video": mp4, "frames": 2}

    def as_images(text, images):
        return model.generate(text, images, **OPTIONS)

    first = as_images(f"<image>\n{shown}Same?", [pixels, *frames])
    assert model.generate("Same?", **both, **OPTIONS) == first
    assert model.generate("<image>\n<video>\nSame?", **both, **OPTIONS) == first
    last = as_images(f"{shown}Same as <image>?", [*frames, pixels])
    assert model.generate("Same as <image>?", **both, **OPTIONS) == last != first
    two = [pixels, pixels[::-1]]
    between = as_images(f"<image> {shown}<image>?", [two[0], *frames, two[1]])
    both["images"] = two
    assert model.generate("<image> <video>\n<image>?", **both, **OPTIONS) == between
    assert model.chat(**OPTIONS).send("<image> <video>\n<image>?", **both) == between
    assert model.generate(
        ["<image> <video>\n<image>?"], [two], video=[mp4], frames=2, **OPTIONS
    ) == [between]


def test_what_is_refused(model, mp4, tmp_path):
    page = np.zeros((9, 9, 3), np.uint8)

    def refused(error, match, prompt="What?", **given):
        with pytest.raises(error, match=match):
            model.generate(prompt, **given, **OPTIONS)

    refused(ValueError, "frames is 0, it must be at least 1", video=mp4, frames=0)
    refused(TypeError, "video is a int; give a path", video=5)
    refused(ValueError, r"uint8\[F, H, W, 3\]", video=np.zeros((3, 9, 9), np.uint8))
    refused(ValueError, "video is an empty list", video=[])
    refused(SampleError, "the video cannot be decoded", video=b"junk")
    refused(SampleError, "absent.mp4: the video cannot", video=str(tmp_path / "absent.mp4"))
    refused(SampleError, 'at most one "<video>"', "<video><video>", video=mp4)
    refused(SampleError, '0 images but 1 "<image>"', "<image>?", video=mp4)
    refused(SampleError, '1 image but 2 "<image>"', "<image><image>", video=mp4, images=page)
    refused(TypeError, "video is a bytes, but prompt is a list", ["a"], video=mp4)
    refused(ValueError, "video has 1 entries for 2 prompts", ["a", "b"], video=[mp4])
