"""Which columns VLMEvalKit e8e78f05 reads of each dataset, by the name of the dataset.

`TABLE` is what its evaluate() reads of MODEL_DATASET.xlsx besides index and prediction; `NEEDED` is
what a task cannot do without in the TSV file, which is the same unless it says otherwise. Every
dataset that a task writes a table for has to be in here.
"""

CHOICE = ("question", "answer", "A", "B")
KIND = (*CHOICE, "category")
MATH = ("question", "answer", "question_for_eval", "metadata")
VERSIONS = ("Vision_Only", "Vision_Dominant", "Vision_Intensive", "Text_Lite", "Text_Dominant")
MMBENCH = [
    f"MMBench_{{}}_{language}{version}" for language in ("EN", "CN") for version in ("", "_V11")
]

TABLE: dict[str, tuple[str, ...]] = {
    "TextVQA_VAL": ("answer",),
    "DocVQA_VAL": ("answer",),
    "DocVQA_TEST": (),
    "InfoVQA_VAL": ("answer",),
    "InfoVQA_TEST": (),
    "GQA_TestDev_Balanced": ("answer",),
    "VizWiz": ("answers",),
    "ChartQA_TEST": ("answer", "split"),
    **{name.format("DEV"): CHOICE for name in MMBENCH},
    **{name.format("TEST"): ("question", "A", "B") for name in MMBENCH},
    "AI2D_TEST": CHOICE,
    "AI2D_TEST_NO_MASK": CHOICE,
    "ScienceQA_TEST": CHOICE,
    "RealWorldQA": CHOICE,
    "SEEDBench_IMG": CHOICE,
    "SEEDBench2_Plus": KIND,
    "MMStar": KIND,
    "BLINK": KIND,
    "MUIRBench": CHOICE,
    "MMMU_DEV_VAL": (*KIND, "split"),
    "MMMU_Pro_10c": KIND,
    "MMMU_Pro_V": ("answer", "A", "B", "category"),
    "MME": ("answer", "category", "image_path"),
    "POPE": ("answer", "category"),
    "HallusionBench": ("question", "answer", "category", "l2-category"),
    "MathVista_MINI": (
        *("question", "answer", "question_type", "answer_type"),
        *("choices", "answer_option", "task", "skills"),
    ),
    "MathVision": ("question", "answer", "choices", "category"),
    "MathVision_MINI": ("question", "answer", "choices", "category"),
    "MathVerse_MINI": MATH,
    **{f"MathVerse_MINI_{version}": MATH for version in VERSIONS},
    "MMVet": ("question", "answer", "category"),
    "LLaVABench": ("question", "gpt4_ans", "caption", "category"),
    "OCRBench": ("answer", "category"),
    "ChartQAPro": ("question", "answer", "question_type", "year"),
    "RefCOCO": (),
    "MVBench_8frame": ("answer", "candidates", "task_type"),
    "Video-MME_8frame": (
        *("question", "answer", "candidates", "duration"),
        *("domain", "sub_category", "task_type"),
    ),
}
MORE = {
    "ChartQAPro": ("paragraph",),
    "MVBench_8frame": ("prefix", "data_type", "bound", "start", "end", "video", "question"),
    "Video-MME_8frame": ("video",),
}
NEEDED = {name: (*columns, *MORE.get(name, ())) for name, columns in TABLE.items()}
