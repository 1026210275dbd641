"""A few made-up questions of every benchmark, in every layout that is read."""

import base64
import csv
import io
import json
from pathlib import Path

import mini_benchmarks
import pyarrow
import pyarrow.parquet
from PIL import Image, ImageDraw

from internvlx_jax.evaluation.tasks.mme import KINDS
from internvlx_jax.evaluation.tasks.mmmu import DOMAINS

ROOT = Path(__file__).parents[2]
TEN = ["red"] * 6 + ["dark red"] * 4
OPTIONS = {"A": "a red car", "B": "blue bus", "C": "tree", "D": "none of these"}


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def picture(number: int) -> bytes:
    """A drawing of 60 to 90 px; every third one with a palette."""
    image = Image.new("RGB", (60 + number % 31, 60), (40 * number % 256, 90, 200))
    ImageDraw.Draw(image).ellipse((5, 5, 20 + number % 30, 40), fill=(250, 37 * number % 256, 0))
    image = image.quantize(8) if number % 3 == 0 else image
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


class Writer:
    """Writes below one folder and counts pictures."""

    def __init__(self, root: Path):
        self.root, self.pictures = root, 0

    def image(self, path: str) -> str:
        self.pictures += 1
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(self.pictures))
        return path

    def text(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")

    def json(self, path: str, value) -> None:
        self.text(path, json.dumps(value))

    def lines(self, path: str, rows) -> None:
        self.text(path, "".join(json.dumps(row) + "\n" for row in rows))

    def base64(self) -> str:
        self.pictures += 1
        return base64.b64encode(picture(self.pictures)).decode()

    def tsv(self, name: str, rows) -> None:
        file = self.root / "tsv" / f"{name}.tsv"
        file.parent.mkdir(parents=True, exist_ok=True)
        names = list(dict.fromkeys(name for row in rows for name in row))
        with file.open("w", encoding="utf-8", newline="") as out:
            writer = csv.DictWriter(out, names, delimiter="\t", lineterminator="\n", restval="")
            writer.writeheader()
            writer.writerows(rows)


def write(root: Path) -> None:
    """Everything that the tasks read, with `root` as their data_root."""
    out = Writer(root)
    folders(out)
    tables(out)
    mini_benchmarks.write(out)


def folders(out: Writer) -> None:
    def questions(
        path, folder, texts=("What color?", "Which one is it?"), field="question", **more
    ):
        rows = [
            {
                "image": f"{out.root.name}/{out.image(f'{folder}/{i}.png')}",
                field: text,
                "question_id": 10 + i,
            }
            | {name: values[i] for name, values in more.items()}
            for i, text in enumerate(texts)
        ]
        out.lines(path, rows)
        return rows

    def coco(path, rows):
        out.json(
            path,
            {
                "annotations": [
                    {"question_id": row["question_id"], "answers": [{"answer": a} for a in TEN]}
                    for row in rows
                ]
            },
        )

    rows = questions("textvqa/textvqa_val.jsonl", "textvqa/train_images")
    questions(
        "textvqa/textvqa_val_llava.jsonl",
        "textvqa/train_images",
        ("What?\nReference OCR token: 7", "Who?"),
    )
    coco("textvqa/textvqa_val_annotations.json", rows)
    coco(
        "okvqa/mscoco_val2014_annotations.json", questions("okvqa/okvqa_val.jsonl", "coco/val2014")
    )
    coco(
        "vqav2/v2_mscoco_val2014_annotations.json",
        questions("vqav2/vqav2_val.jsonl", "coco/val2014"),
    )
    questions("vqav2/vqav2_testdev.jsonl", "coco/test2015")
    coco("vizwiz/vizwiz_val_annotations.json", questions("vizwiz/vizwiz_val.jsonl", "vizwiz/val"))
    questions("vizwiz/vizwiz_test.jsonl", "vizwiz/test")
    questions(
        "gqa/llava_gqa_testdev_balanced_qwen_format.jsonl", "gqa/images", answer=["red", "bus"]
    )
    for name, key in (
        ("docvqa", "docvqa/val/val_v1.0.json"),
        ("infographicsvqa", "infographicsvqa/infographicsVQA_val_v1.0_withQT.json"),
    ):
        rows = questions(f"{name}/val.jsonl", f"{name}/val")
        out.json(
            key,
            {
                "data": [
                    {"questionId": row["question_id"], "answers": ["12 May", "May 12"]}
                    for row in rows
                ]
            },
        )
        questions(f"{name}/test.jsonl", f"{name}/test")
    for split in ("test_human", "test_augmented"):
        questions(f"chartqa/{split}.jsonl", "chartqa/png", answer=["10", "Total"])
    questions(
        "ai2diagram/test_vlmevalkit.jsonl",
        "ai2diagram/images",
        ("Which?\nA. x\nB. y\nLetter!",) * 2,
        answer=["A", "B"],
    )
    questions(
        "scienceqa/scienceqa_test_img.jsonl",
        "scienceqa/images",
        hint=["", "Look."],
        choices=[["sun", "moon"], ["salt", "tea", "ice"]],
        answer=[1, 2],
    )

    for kind in KINDS:
        name = f"{kind}.png"
        folder = "images/" if kind == "artwork" else ""
        out.image(f"mme/MME_Benchmark_release_version/{kind}/{folder}{name}")
        out.text(f"mme/Your_Results/{kind}.txt", f"{name}\tIs it?\tYes\n{name}\tIs it not?\tNo\n")
    rows = questions("mm-vet/llava-mm-vet.jsonl", "mm-vet/images", field="text")
    out.json(
        "mm-vet/mm-vet.json",
        {
            f"v1_{row['question_id']}": {"answer": "x<AND>y", "capability": caps}
            for row, caps in zip(rows, (["rec"], ["ocr", "rec"]))
        },
    )
    rows = []
    for i, category in enumerate(("random", "popular", "adversarial")):
        rows += [
            {
                "question_id": 2 * i + j,
                "image": Path(out.image(f"pope/val2014/{2 * i + j}.png")).name,
                "text": "Is there a dog?",
                "category": category,
            }
            for j in (0, 1)
        ]
        out.lines(
            f"pope/coco/coco_pope_{category}.json",
            [{"question_id": 1, "label": "yes"}, {"question_id": 2, "label": "no"}],
        )
    out.lines("pope/llava_pope_test.jsonl", rows)
    questions(
        "SEED/seed.jsonl", "SEED/images", ("What?\nA. x\nB. y", "When?\nA. x\nB. y"), field="text"
    )
    out.json(
        "SEED/SEED-Bench.json",
        {
            "questions": [
                {"question_id": 10, "question_type_id": 1, "answer": "A"},
                {"question_id": 11, "question_type_id": 10, "answer": "B"},
            ]
        },
    )
    rows = questions(
        "llava-bench-in-the-wild/questions.jsonl",
        "llava-bench-in-the-wild/images",
        field="text",
        category=["conv", "detail"],
    )
    out.lines(
        "llava-bench-in-the-wild/context.jsonl",
        [{"image": Path(row["image"]).name, "caption": "A thing."} for row in rows],
    )
    out.lines(
        "llava-bench-in-the-wild/answers_gpt4.jsonl",
        [{"question_id": row["question_id"], "text": "It is a thing."} for row in rows],
    )
    for file in (
        "mmbench_dev_20230712",
        "mmbench_dev_cn_20231003",
        "mmbench_test_en_20231003",
        "mmbench_test_cn_20231003",
    ):
        out.tsv(f"../mmbench/{file}", mmbench_rows(out, "请看" if "_cn_" in file else "Which one?"))

    def cell():
        out.pictures += 1
        return {"bytes": picture(out.pictures), "path": None}

    subjects = sorted(subject for domain in DOMAINS.values() for subject in domain)
    for i, subject in enumerate(subjects):
        row = {
            "id": f"validation_{subject}_1",
            "question": "<image 1> Which?",
            "options": "['x', 'y']",
            "answer": "B",
            "question_type": "multiple-choice",
            "image_1": cell(),
            "image_2": cell() if i == 0 else None,
        }
        if i == 1:
            row |= {"options": "[]", "answer": "3.14", "question_type": "open"}
        folder = out.root / "MMMU" / subject
        folder.mkdir(parents=True)
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist([row]), folder / "validation-00000-of-00001.parquet"
        )
    folder = out.root / "MathVista" / "data"
    folder.mkdir(parents=True)
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(
            [
                {
                    "pid": "1",
                    "query": "Question: how many?",
                    "decoded_image": cell(),
                    "choices": None,
                    "precision": None,
                    "answer": "3",
                    "question_type": "free_form",
                    "answer_type": "integer",
                    "metadata": {"task": "figure question answering", "skills": ["arithmetic"]},
                },
                {
                    "pid": "2",
                    "query": "Question: which?",
                    "decoded_image": cell(),
                    "choices": ["3/4", "1/2"],
                    "precision": None,
                    "answer": "1/2",
                    "question_type": "multi_choice",
                    "answer_type": "text",
                    "metadata": {"task": "math word problem", "skills": ["arithmetic"]},
                },
            ]
        ),
        folder / "testmini-00000-of-00001.parquet",
    )


def mmbench_rows(out: Writer, text: str) -> list[dict]:
    first = {
        "index": 1,
        "question": text,
        "hint": "Look\nhere.",
        **OPTIONS,
        "answer": "A",
        "category": "color",
        "image": out.base64(),
        "source": "s",
        "l2-category": "perception",
        "comment": "c",
        "split": "dev",
    }
    rotated = first | {
        "index": 1_000_001,
        "answer": "B",
        "A": OPTIONS["D"],
        "B": OPTIONS["A"],
        "image": "1",
    }
    other = first | {
        "index": 2,
        "hint": "",
        "answer": "C",
        "category": "shape",
        "image": out.base64(),
        "D": "",
    }
    return [first, rotated, other]


def tables(out: Writer) -> None:
    def rows(*columns, **common):
        return [
            {"index": i, "image": out.base64(), "question": "What is it?"} | common | row
            for i, row in enumerate(columns)
        ]

    choice = OPTIONS | {"category": "c", "l2-category": "d", "split": "test"}
    out.tsv("TextVQA_VAL", rows({"answer": str(TEN)}, {"answer": str(TEN)}))
    out.tsv("VizWiz", rows({"answers": str(TEN)}, {"answers": str(TEN)}))
    for name in ("DocVQA_VAL", "InfoVQA_VAL"):
        out.tsv(name, rows({"answer": "['12 May', 'May 12']"}, {"answer": "12 May"}))
    for name in ("DocVQA_TEST", "InfoVQA_TEST"):
        out.tsv(name, rows({}, {}))
    out.tsv("GQA_TestDev_Balanced", rows({"answer": "red"}, {"answer": "bus"}))
    out.tsv(
        "ChartQA_TEST",
        rows(
            {"answer": "['10']", "split": "test_human"}, {"answer": "10", "split": "test_augmented"}
        ),
    )
    for name in ("AI2D_TEST", "SEEDBench_IMG", "ScienceQA_TEST", "RealWorldQA"):
        out.tsv(name, rows({"answer": "A"}, {"answer": "B", "hint": "Look."}, **choice))
    for name in ("MMBench_DEV_EN", "MMBench_TEST_EN"):
        out.tsv(name, mmbench_rows(out, "Which one?"))
    for name in ("MMBench_DEV_CN", "MMBench_TEST_CN"):
        out.tsv(name, mmbench_rows(out, "哪一个?"))
    out.tsv(
        "MME",
        [
            row | {"index": i}
            for i, row in enumerate(
                row
                for kind in KINDS
                for row in rows(
                    {"answer": "Yes"},
                    {"answer": "No"},
                    category=kind,
                    image_path=f"{kind}/1.png",
                )
            )
        ],
    )
    out.tsv(
        "POPE",
        rows(
            {"answer": "Yes", "category": "random,popular"},
            {"answer": "No", "category": "adversarial"},
        ),
    )
    out.tsv(
        "MMVet",
        rows({"answer": "x<OR>y", "category": "rec,ocr"}, {"answer": "z", "category": "rec"}),
    )
    pair = str([out.base64(), out.base64()])
    out.tsv(
        "MMMU_DEV_VAL",
        rows(
            {"answer": "A", "split": "validation", "image": pair, "category": "Art", **OPTIONS},
            {"answer": "seven", "split": "validation", "category": "Math"},
            {"answer": "A", "split": "dev", "category": "Math", **OPTIONS},
        ),
    )
    out.tsv(
        "HallusionBench",
        [
            row | {"index": f"image_VD_illusion_{row['index']}_0_1"}
            for row in rows(
                {"answer": "Yes"}, {"answer": "No"}, category="VD", **{"l2-category": "illusion"}
            )
        ],
    )
    out.tsv(
        "MathVista_MINI",
        rows(
            {"answer": "3", "question_type": "free_form", "answer_type": "integer"},
            {"answer": "1.5", "question_type": "free_form", "answer_type": "float"},
            {
                "answer": "red",
                "question_type": "multi_choice",
                "answer_type": "text",
                "choices": "['blue', 'red']",
                "answer_option": "B",
            },
            task="figure question answering",
            skills="['statistical reasoning']",
        ),
    )
    out.tsv(
        "LLaVABench",
        rows(
            {"gpt4_ans": "A thing.", "caption": "Thing", "category": "conv"},
            {"gpt4_ans": "A cat.", "caption": "Cat", "category": "complex"},
        ),
    )
