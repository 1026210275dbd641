"""A few made-up questions of the benchmarks of today, with the columns of the published files."""

import base64
import io

import pyarrow
import pyarrow.parquet
from PIL import Image

OPTIONS = {"A": "a red car", "B": "blue bus", "C": "tree", "D": "none of these"}
RED, BLUE = (220, 40, 40), (30, 60, 210)
FRAMES = 24  # of the video files, first half red and second half blue
SPLITS = ("RefCOCO val", "RefCOCO test A", "RefCOCO+ val", "RefCOCOg test")


def write(out) -> None:
    """Writes everything with a `mini_data.Writer`."""
    choices(out)
    mathematics(out)
    documents(out)
    mmmu_pro(out)
    boxes(out)
    videos(out)


def rows(out, *columns, start=0, **common):
    return [
        {"index": start + i, "image": out.base64(), "question": "What is it?"} | common | row
        for i, row in enumerate(columns)
    ]


def pictures(out, count):
    return f"[{', '.join(repr(out.base64()) for _ in range(count))}]"


def choices(out) -> None:
    from mini_data import mmbench_rows

    for split in ("DEV", "TEST"):
        out.tsv(f"MMBench_{split}_EN_V11", mmbench_rows(out, "Which one?"))
        out.tsv(f"MMBench_{split}_CN_V11", mmbench_rows(out, "哪一个?"))
    kinds = {"category": "coarse perception", "l2_category": "image scene and topic"}
    table = rows(out, {"answer": "A"}, {"answer": "C"}, **OPTIONS, **kinds, bench="MMBench")
    out.tsv("MMStar", table)
    extra = {"category": "Chart", "data_id": "1", "question_id": "q"}
    out.tsv("SEEDBench2_Plus", rows(out, {"answer": "B"}, {"answer": "D"}, **OPTIONS, **extra))
    numbers = {"A": "1", "B": "2", "C": "3", "D": "4", "category": "Food web"}
    out.tsv("AI2D_TEST_NO_MASK", rows(out, {"answer": "B"}, {"answer": "A"}, **numbers))
    two = {"A": "Point A", "B": "Point B", "C": "", "D": "", "category": "Relative_Depth"}
    blink = rows(out, {"answer": "A"}, {"answer": "B", "image": pictures(out, 2)}, **two)
    out.tsv("BLINK", blink)
    out.tsv(
        "MUIRBench",
        rows(
            out,
            {"question": "<image> <image> Which differs?", "image": pictures(out, 2)},
            {"question": "In <image>, where is <image>?", "image": pictures(out, 2)},
            {"question": "What is it?<image>"},
            answer="A",
            task="Visual Grounding",
            image_type="Photography",
            image_relation="Multiview",
            **OPTIONS,
        ),
    )


def mathematics(out) -> None:
    for name in ("MathVision", "MathVision_MINI"):
        out.tsv(
            name,
            rows(
                out,
                {"question": "How many?\n<image1>", "choices": "[]", "answer": "12"},
                {"question": "Which?\n<image1>", "choices": "['1', '2', '4']", "answer": "C"},
                category="counting",
                level="2",
            ),
        )
    versions = ("Vision_Only", "Vision_Dominant", "Vision_Intensive", "Text_Lite", "Text_Dominant")
    for name in ("", *versions):
        version = (name or "Text_Lite").replace("_", " ")
        meta = {"split": "testmini", "source": "GEOS", "subject": "Plane Geometry"}
        meta |= {"subfield": "Circle"}
        common = {
            "query_cot": "First think.",
            "question_for_eval": "How long is AB?",
            "problem_version": version,
            "problem_index": "1",
            "question_type": "free-form",
            "metadata": str(meta),
        }
        ask = "please directly answer the question and provide the final value. AB?"
        table = rows(out, {"answer": "12"}, {"answer": "C"}, question=ask, **common)
        out.tsv("_".join(filter(None, ("MathVerse_MINI", name))), table)


def documents(out) -> None:
    out.tsv(
        "OCRBench",
        rows(
            out,
            {"answer": "['Stop', 'STOP sign']", "category": "Regular Text Recognition"},
            {"answer": "['12']", "category": "Doc-oriented VQA"},
            {
                "answer": "['\\\\frac { 1 } { 2 }']",
                "category": "Handwritten Mathematical Expression Recognition",
            },
            dataset="IIIT5K",
        ),
    )
    turns = {"question": "['Total?', 'And in 2020?']", "answer": "['7', '2020']"}
    out.tsv(
        "ChartQAPro",
        rows(
            out,
            {"question": "['Total?']", "answer": "['3.5']", "question_type": "Factoid"},
            turns | {"question_type": "Conversational", "year": "['NO', 'YES']"},
            {"question": "['True?']", "answer": "['true']", "question_type": "Fact Checking"},
            year="['NO']",
            paragraph="",
        ),
    )


def mmmu_pro(out) -> None:
    ten = {letter: f"option {letter}" for letter in "ABCDEFGHIJ"} | {"category": "Math"}
    pair = pictures(out, 2)
    out.tsv(
        "MMMU_Pro_10c",
        rows(
            out,
            {"question": "See <image 1>. How many?", "answer": "J"},
            {"question": "<image 2> or <image 1>?", "answer": "A", "image": pair},
            id="test_Math_1",
            **ten,
        ),
    )
    vision = rows(out, {"answer": "C"}, id="test_Math_1", **ten)
    for row in vision:
        del row["question"]
    out.tsv("MMMU_Pro_V", vision)

    def cell():
        return {"bytes": base64.b64decode(out.base64()), "path": None}

    listed = str([f"option {letter}" for letter in "ABCDEFGHIJ"])
    common = {"id": "test_Math_1", "options": listed, "answer": "B", "subject": "Math"}
    none = {f"image_{i}": None for i in range(1, 8)}
    standard = [
        common | none | {"question": "<image 1> How many?", "image_1": cell()},
        common
        | none
        | {"question": "<image 2> or <image 1>?", "image_1": cell(), "image_2": cell()},
    ]
    for setting, table in (
        ("standard (10 options)", standard),
        ("vision", [common | {"image": cell()}]),
    ):
        folder = out.root / "MMMU_Pro" / setting
        folder.mkdir(parents=True)
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(table), folder / "test-00000-of-00001.parquet"
        )


def boxes(out) -> None:
    from internvlx_jax.evaluation.tasks.refcoco import SPLITS as FILES

    for _, file, _, _ in FILES:
        image = out.image(f"coco/train2014/{file}.png")
        row = {"image": f"{out.root.name}/{image}", "sent": "left cup", "height": 60, "width": 80}
        out.lines(f"refcoco/{file}.jsonl", [row | {"bbox": [0, 0, 40, 30]}] * 2)
    table = [
        row
        for i, split in enumerate(SPLITS)
        for row in rows(out, {"category": split}, answer="[0.0, 0.0, 40.0, 30.0]", start=i)
    ]
    out.tsv("RefCOCO", [row | {"width": 80, "height": 60} for row in table])


def videos(out) -> None:
    from internvlx_jax.evaluation.tasks.mvbench import COLUMNS, KINDS

    table = []
    for kind, (folder, bound) in KINDS.items():
        name = kind.lower().replace(" ", "_").replace("-", "_")
        frames = kind == "Episodic Reasoning"
        video = "clip_1" if frames else "clip.mp4"
        target = out.root / "MVBench" / "video" / folder / video
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            folder_of_frames(target) if frames else video_file(target)
        entry = {
            "video": video,
            "question": "What color comes last?",
            "candidates": ["red", "blue"],
            "answer": "blue",
        }
        entry |= {"start": 0.0, "end": 1.0} if bound else {}
        out.json(f"MVBench/json/{name}.json", [entry])
        row = entry | {
            "index": len(table),
            "task_type": kind,
            "prefix": f"video/{folder}/",
            "data_type": "frame" if frames else "video",
            "bound": bound,
            "candidates": str(entry["candidates"]),
        }
        table.append({name: row.get(name, "") for name in COLUMNS})
    out.tsv("MVBench", table)
    common = {"domain": "Knowledge", "sub_category": "Law", "task_type": "OCR Problems"}
    out.tsv(
        "Video-MME",
        [
            {
                "index": i,
                "video": f"clip{i}",
                "video_path": f"./video/clip{i}.mp4",
                "duration": duration,
                **common,
                "candidates": str(["A. Red.", "B. Blue.", "C. Green.", "D. None."]),
                "subtitle_path": f"./subtitle/clip{i}.srt",
                "question": "What color comes last?",
                "answer": "B",
            }
            for i, duration in enumerate(("short", "long"))
        ],
    )
    folder = out.root / "Video-MME" / "video"
    folder.mkdir(parents=True)
    video_file(folder / "clip0.mp4")
    folder_of_frames(folder / "clip1")


def frame(color) -> Image.Image:
    return Image.new("RGB", (48, 32), color)


def folder_of_frames(folder) -> None:
    folder.mkdir(parents=True)
    for i in range(1, 7):
        frame(RED if i < 4 else BLUE).save(folder / f"{i:05d}.jpg")


def video_file(path) -> None:
    """Writes a video of two seconds with 12 frames per second."""
    import av

    data = io.BytesIO()
    with av.open(data, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=12)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for i in range(FRAMES):
            picture = frame(RED if i < FRAMES // 2 else BLUE)
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    path.write_bytes(data.getvalue())
