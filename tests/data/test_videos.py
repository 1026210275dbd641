"""Video files and GIFs as training samples (design: data.md 2, 3, 10, 15)."""

import dataclasses
import functools
import json
import sys

import pytest
from tiny_videos import gif, numbers, video

from internvlx_jax.core.data_config import DataConfig, FaultConfig, ImageConfig, VideoConfig
from internvlx_jax.core.errors import SampleError
from internvlx_jax.data.check import whole_row
from internvlx_jax.data.pipeline import Loader
from internvlx_jax.data.video import FileFrames
from internvlx_jax.data.video_files import VideoLimits, check_video, clip_bounds, decode_frames

FRAMES = VideoConfig(min_frames=3, max_frames=5)
CONFIG = DataConfig(
    meta="",
    max_length=256,
    tokens_per_step=128,
    video=FRAMES,
    faults=FaultConfig(on_bad="replace", max_share=1.0),
)


@pytest.fixture(scope="module")
def mp4() -> bytes:
    return video()


def write(folder, files: dict[str, bytes], **fields):
    """Writes a dataset with one sample for each file; returns its meta file."""
    lines = []
    for name, data in files.items():
        (folder / name).write_bytes(data)
        turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "It moves."}]
        lines.append(json.dumps({"video": name, "conversations": turns} | fields.get(name, {})))
    (folder / "clips.jsonl").write_text("\n".join(lines) + "\n")
    meta = folder / "meta.json"
    meta.write_text(json.dumps({"d": {"root": str(folder), "annotation": "clips.jsonl"}}))
    return meta


def rows(loader: Loader, epoch: int) -> dict[str, tuple[list[int], list[int]]]:
    """Returns tokens and numbers of the frames of each sample of a pass."""
    found, processor = {}, loader.processors[0]
    for step in loader.steps(loader.plan.first_step(epoch), loader.plan.first_step(epoch + 1)):
        inputs = step.batch.inputs
        for row, name in enumerate(step.sample_ids):
            tokens = inputs.tokens[row, : int(inputs.segment_ids[row].sum())].tolist()
            k = tokens.count(processor.tokenizer.image_token_id) // processor.tokens_per_tile
            found[name] = (tokens, numbers(inputs.tiles[row, :k]))
    return found


def test_frames_by_number(mp4, tmp_path):
    for kind in ("mp4", "matroska", "avi", "mpegts"):
        found = decode_frames(video(kind=kind), lambda total, rate: [0, 7, 11, total - 1, 99])
        assert numbers(found.images) == [0, 7, 11, 23, 23] and not found.damaged, kind
    found = decode_frames(gif(), lambda total, rate: [3, 20] if (total, rate) == (24, 10) else [])
    assert numbers(found.images) == [3, 20] and {image.mode for image in found.images} == {"RGB"}


def test_far_frames_are_reached_by_seeking():
    long = decode_frames(video(620, rate=25, gop=12), lambda total, rate: [5, 290, 619])
    assert numbers(long.images) == [5, 290 % 32, 619 % 32]


def test_clips_and_short_videos(mp4):
    middle = FileFrames(4, clip=(1.0, 2.0))
    assert numbers(decode_frames(mp4, middle).images) == [8, 10, 12, 14]
    assert numbers(decode_frames(video(2), FileFrames(4)).images) == [0, 1, 1, 1]
    assert clip_bounds(24, 8.0, (2.9, 50.0), "v") == (23, 24)
    with pytest.raises(SampleError, match=r"v: the clip begins at 3 s, the video ends at 3.0 s"):
        clip_bounds(24, 8.0, (3.0, 4.0), "v")


def test_every_host_and_every_start_takes_the_same_frames(processor, tmp_path, mp4):
    files = {f"{i}.mp4": mp4 for i in range(6)} | {"a.gif": gif(), "short.mp4": video(2)}
    meta = write(tmp_path, files, **{"0.mp4": {"clip": [0, 1]}})
    loaders = [Loader(str(meta), CONFIG, processor, row_quantum=1, seed=0) for _ in range(2)]
    first, again = (rows(loader, 0) for loader in loaders)
    assert first == again and len(first) == 8
    second = rows(loaders[0], 1)
    assert any(first[name][1] != second[name][1] for name in first), "other frames in a new pass"
    other = Loader(str(meta), CONFIG, processor, row_quantum=1, seed=1)
    assert rows(other, 0) != first
    table = loaders[0].table
    for position, (tokens, frames) in ((int(k[2:]) - 1, v) for k, v in first.items()):
        assert len(tokens) == table.length[position] and len(frames) == table.tiles[position]
        assert 3 <= len(frames) <= 5 and frames == sorted(frames)
    assert max(first["d:1"][1]) < 8, "of the first second only"
    assert first["d:8"][1][-2:] == [1, 1], "the last frame is repeated"


def test_damaged_files_are_counted_and_replaced(processor, tmp_path, mp4):
    avi = video(kind="avi")
    files = {f"{i}.mp4": mp4 for i in range(6)}
    files |= {"junk.mp4": b"no video", "half.avi": avi[: avi.index(b"idx1") - 300]}
    meta = write(tmp_path, files)
    config = dataclasses.replace(CONFIG, video=VideoConfig(min_frames=12, max_frames=12))
    loader = Loader(str(meta), config, processor, row_quantum=1, seed=0)
    bad = [(line, error.reason) for line, error in bad_samples(loader)]
    assert bad == [(7, "unreadable")]
    taken = rows(loader, 0)
    assert set(taken) == {f"d:{line}" for line in (1, 2, 3, 4, 5, 6, 8)}
    assert taken["d:8"][1][-1] == taken["d:8"][1][-2] < 20, "decoded as far as it goes"
    read = functools.partial(
        loader.reader.read, 0, 7, cycle=0, tiles=12, capacity=whole_row(config)
    )
    assert read().counted == ("truncated",)
    loader.reader.processors[0] = dataclasses.replace(
        loader.processors[0], images=ImageConfig(truncated="reject")
    )
    with pytest.raises(SampleError, match=r"line 8: .*half.avi: the video is damaged") as raised:
        read()
    assert raised.value.reason == "truncated"
    (tmp_path / "0.mp4").write_bytes(mp4[: len(mp4) // 2])
    again = Loader(str(meta), config, processor, row_quantum=1, seed=0)
    assert [line for line, _ in bad_samples(again)] == [1, 7], "measured again, as it has changed"


def bad_samples(loader: Loader):
    (index,) = loader.indexes
    return [(position + 1, error) for position, error in index.bad]


def test_what_is_refused(processor, tmp_path, mp4, monkeypatch):
    write(tmp_path, {"0.mp4": mp4, "1.mp4": mp4[:400]})
    with pytest.raises(SampleError, match="the video cannot be decoded"):
        check_video(str(tmp_path / "1.mp4"))
    check_video(str(tmp_path / "0.mp4"))
    with pytest.raises(SampleError, match=r"48 x 32 pixels are more than max_pixels = 1000"):
        check_video(str(tmp_path / "0.mp4"), VideoLimits(max_pixels=1000))
    with pytest.raises(SampleError, match="decoding the video takes over 0 s"):
        decode_frames(mp4, FileFrames(3), VideoLimits(seconds=0.0))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(SampleError, match=r"needs av, .* pip install 'internvlx-jax\[video\]'"):
        check_video(mp4)


def test_playlists_open_nothing(tmp_path, mp4):
    """They would name files and addresses of the machine that decodes."""
    (tmp_path / "a.mp4").write_bytes(mp4)
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{tmp_path}/a.mp4\n#EXT-X-ENDLIST\n"
    for text in (playlist, f"ffconcat version 1.0\nfile '{tmp_path}/a.mp4'\n", "RTSP/1.0", ""):
        with pytest.raises(SampleError, match="the video cannot be decoded"):
            decode_frames(text.encode(), FileFrames(3))
