"""EMG: healthy, myopathy or neuropathy from a window of needle EMG (PhysioNet emgdb), with clinical suggestions.

The reward has the published three parts: 0.9 for the class, 0.1 for the format and, where both are right, 0.5 for what
a judge thinks of the suggestions. The rubric's criteria, cap and stock phrases are TimeMaster's (arXiv 2506.13705); its
wording is ours.
"""

from verl.timeseries.emgdb import EmgdbReader
from verl.timeseries.numeric import NumericFormat
from verl.timeseries.style import PlotStyle
from verl.timeseries.task import ClassSpec, Download, Suggestion, TaskSpec
from verl.utils.reward_score.judge.rubric import Rubric
from verl.utils.reward_score.parts import PUBLISHED, PartKind, RewardPart

RUBRIC = Rubric(
    name="emg-extension",
    task=(
        "A model looked at a short needle EMG of the tibialis anterior, reasoned, chose Healthy, Myopathy or "
        "Neuropathy and then wrote suggestions for the clinician in the field extension. You do not see the recording: "
        "take the chosen class as given. Grade the field extension only; reasoning and class are there for context."
    ),
    criteria=(
        ("specificity", "names concrete findings, muscles, nerves, tests, intervals or thresholds; 0 for generalities"),
        ("appropriateness", "sound and safe medical practice for the chosen class"),
        ("relevance", "follows from this signal, this reasoning and this class"),
        ("depth", "explains why, in which order and what each result would change; 0 for a bare list or one line"),
    ),
    stock_phrases=(
        "further tests",
        "clinical history",
        "physical examination",
        "refer to specialist",
        "confirm the diagnosis",
    ),
    stock_field="extension",
    cap=0.4,
)

TASK = TaskSpec(
    name="emg",
    data_source="emg_dataset",
    class_specs=(
        ClassSpec("Healthy", "emg_healthy", "normal motor units"),
        ClassSpec(
            "Myopathy", "emg_myopathy", "muscle disease: small, short, many-phased units that are recruited early"
        ),
        ClassSpec("Neuropathy", "emg_neuropathy", "nerve disease: large, long units that are few and fire fast"),
    ),
    question=(
        "The plot shows a short needle-electrode EMG of the tibialis anterior muscle, amplitude in mV, 375 ms sampled "
        "at 4 kHz. Use the shape and the timing of the waveform to decide what the person has. "
        "Choose the label that fits the whole signal."
    ),
    answer_format=(
        "First reason step by step inside <think> </think>. Then give exactly one label, 'Healthy', 'Myopathy' or "
        "'Neuropathy', inside <class> </class>. Then write suggestions for the clinician inside "
        "<extension> </extension>, and nothing after it."
    ),
    reader=EmgdbReader(),
    plot=PlotStyle(title="EMG Signal", x_label="Timestamp", y_label="Amplitude (mV)"),
    channels=1,
    length=1500,
    rows=(163, 41),
    time_step=1 / 4000,
    unit="mV",
    numeric=NumericFormat(decimals=3, points=500),
    suggestions={
        "Healthy": Suggestion(
            weak="Recruitment is sparse, so record the tibialis anterior again at a stronger dorsiflexion to see a "
            "full interference pattern.",
            strong="Recruitment and unit size fit the effort, so the muscle needs no second needle site.",
            then="If weakness is still felt, measure peroneal nerve conduction and the F wave next, because a block "
            "above the ankle leaves this muscle electrically normal.",
            strong_from=0.35,
        ),
        "Myopathy": Suggestion(
            weak="The small units speak for loss of muscle fibres, so sample vastus lateralis and deltoid to map how "
            "proximal it is.",
            strong="Full activity at little effort speaks for early recruitment, so take creatine kinase and sample "
            "vastus lateralis and deltoid.",
            then="If fibrillation is found at rest, choose that muscle on the other side for biopsy, because active "
            "inflammation would change the steroid dose.",
            strong_from=0.5,
        ),
        "Neuropathy": Suggestion(
            weak="Few units fire here, so compare with tibialis posterior and peroneus longus to tell the L5 root from "
            "the peroneal nerve.",
            strong="The giant units speak for reinnervation over months, so compare with tibialis posterior, which "
            "shares the L5 root but not the peroneal nerve.",
            then="If both are affected, image the lumbar spine before nerve conduction, because a compressed root "
            "with weakness sets the time of surgery.",
            strong_from=3.0,
        ),
    },
    reward=(
        *PUBLISHED,
        RewardPart(name="soft", kind=PartKind.SOFT, weight=0.5, when=("label", "format"), options={"rubric": RUBRIC}),
    ),
    # 41 of 163: fit, val and test have 122, 41 and 41 rows, as in TF-C's split. A val drawn at random would lie between
    # the windows of fit, while test lies behind them, and so would flatter.
    val_fraction=0.25,
    val_last=True,
    warnings=(
        "emgdb is three people, one per class: every split shares the person between train and test, so an accuracy "
        "says how well windows of one recording are told apart, not how well a disease is recognised",
        "val is the last windows of each recording's train part, so none lies between two windows of fit; the seed "
        "changes nothing",
    ),
    download=Download(
        url="https://physionet.org/files/emgdb/1.0.0/",
        sha256={
            "emg_healthy.dat": "4990f34f0ffb314f6ce70c1d2089b7ce41fa96d19fcd9fb334815ca5033966fd",
            "emg_healthy.hea": "61221ce33e167d246ec2ea8984ce2f25882b32b4d90bd7ef785c7b56ef95bac5",
            "emg_healthy.txt": "d9b8271c2f6aed29f78bb02233744b70b8c92fe5044c86719fa5dfbefd00ef5c",
            "emg_myopathy.dat": "2c310a0f61843a5a5e906d413b6ff7f51370a91e516344af511c7fe6da9eaf7f",
            "emg_myopathy.hea": "752093a1e3af87cd87e39f553b8725133f57a75413661208e5d93c8d2c60e73b",
            "emg_myopathy.txt": "f7ef2b145558e9cd3686852bb74211ee6e53b56892329866012d85fb92f6a04a",
            "emg_neuropathy.dat": "108c6c71d3792f3dba645539bd9241119fb4c6a3a0f3e515399694b072375dd5",
            "emg_neuropathy.hea": "a424c80b6a5cc5733456f0848c2650321cac3658d9b02b845e08b619b2807ce0",
            "emg_neuropathy.txt": "513c4e8752319c8163cd04f0e049c9dc92f8b2fe269f89b047bea52e7245ada8",
        },
    ),
    licence="ODC-By 1.0",
    citation="Goldberger et al., PhysioBank, PhysioToolkit, and PhysioNet, Circulation 101(23), e215-e220, 2000",
)
