"""ECG: rhythm from five seconds of a single-lead ECG (PhysioNet/CinC Challenge 2017), split by record."""

from verl.timeseries.cinc import CincReader
from verl.timeseries.numeric import NumericFormat
from verl.timeseries.style import PlotStyle
from verl.timeseries.task import ClassSpec, Download, TaskSpec

TASK = TaskSpec(
    name="ecg",
    data_source="ecg_dataset",
    class_specs=(
        ClassSpec("normal sinus rhythm", "N", "regular beats, each led by a P wave"),
        ClassSpec("atrial fibrillation", "A", "irregularly irregular beats without P waves"),
        ClassSpec("other cardiac rhythms", "O", "an abnormal rhythm that is not atrial fibrillation"),
        ClassSpec("noise", "~", "too disturbed to tell the rhythm"),
    ),
    question=(
        "The plot shows five seconds of a single-lead ECG from a hand-held device, amplitude in mV, sampled at 300 Hz. "
        "Use the spacing of the beats and the shape of the waves to decide what the rhythm is. "
        "Choose the label that fits the whole signal."
    ),
    answer_format=(
        "First reason step by step inside <think> </think>. Then give exactly one label, 'normal sinus rhythm', "
        "'atrial fibrillation', 'other cardiac rhythms' or 'noise', inside <class> </class>, and nothing after it."
    ),
    reader=CincReader(),
    plot=PlotStyle(title="ECG Signal", x_label="Timestamp", y_label="Amplitude (mV)", line_width=1.2),
    numeric=NumericFormat(decimals=2, points=500),
    channels=1,
    length=1500,
    # Of windows; the reader compares the files with the reference instead.
    rows=None,
    time_step=1 / 300,
    unit="mV",
    warnings=(
        "the public set has no patient ids: windows of one record stay together, but two records of one person may lie "
        "on both sides; labels are given per record, so a window may not show what its label says",
    ),
    download=Download(url="https://physionet.org/files/challenge-2017/1.0.0/training2017.zip"),
    licence="ODC-By 1.0",
    citation=(
        "Clifford et al., AF classification from a short single lead ECG recording, Computing in Cardiology 2017, "
        "doi:10.22489/CinC.2017.065-469; Goldberger et al., Circulation 101(23), e215-e220, 2000"
    ),
)
