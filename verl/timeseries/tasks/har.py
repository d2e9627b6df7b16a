"""HAR: what a person does, from body acceleration of a smartphone at the waist (UCI HAR, Inertial Signals)."""

from dataclasses import replace

from verl.timeseries.numeric import NumericFormat
from verl.timeseries.style import LINES
from verl.timeseries.task import ClassSpec, Download, TaskSpec
from verl.timeseries.ucihar import UciHarReader

SIGNALS = ("body_acc_x", "body_acc_y", "body_acc_z")

TASK = TaskSpec(
    name="har",
    data_source="har_dataset",
    class_specs=(
        ClassSpec("WALKING", "1"),
        ClassSpec("WALKING_UPSTAIRS", "2"),
        ClassSpec("WALKING_DOWNSTAIRS", "3"),
        ClassSpec("SITTING", "4"),
        ClassSpec("STANDING", "5"),
        ClassSpec("LAYING", "6"),
    ),
    question=(
        "The plot shows the body acceleration (gravity removed) along three axes, in g, of a smartphone at a person's "
        "waist: 2.56 seconds at 50 Hz. Decide what the person was doing: WALKING, WALKING_UPSTAIRS, "
        "WALKING_DOWNSTAIRS, SITTING, STANDING or LAYING."
    ),
    answer_format=(
        "First reason step by step inside <think> </think>. Then give exactly one of these labels inside "
        "<class> </class>, and nothing after it."
    ),
    reader=UciHarReader(SIGNALS),
    plot=replace(
        LINES,
        title="HAR Signals",
        x_label="Timestamp",
        y_label="Body Linear Acceleration (g)",
        channel_names=SIGNALS,
    ),
    numeric=NumericFormat(decimals=3),
    channels=3,
    length=128,
    # The reader compares the files of a split with each other.
    rows=None,
    time_step=0.02,
    unit="g",
    overlap=0.5,
    warnings=(
        "windows overlap by half: fit and val are cut by subject, or by runs of one activity where subject ids are "
        "absent, never by row",
        "body_acc has gravity removed, so SITTING, STANDING and LAYING look nearly alike",
    ),
    download=Download(
        url="https://archive.ics.uci.edu/static/public/240/human+activity+recognition+using+smartphones.zip"
    ),
    licence="README.txt of the set: cite, no commercial use",
    citation=(
        "Anguita, Ghio, Oneto, Parra, Reyes-Ortiz, Human Activity Recognition on Smartphones using a Multiclass "
        "Hardware-Friendly Support Vector Machine, IWAAL 2012"
    ),
)
