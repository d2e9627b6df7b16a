"""CTU: desktop or laptop from one day of electricity use (UCR Computers, study "Powering the Nation")."""

from verl.timeseries.readers import UcrReader
from verl.timeseries.style import PlotStyle
from verl.timeseries.task import ClassSpec, Download, TaskSpec

TASK = TaskSpec(
    name="ctu",
    data_source="computer_dataset",
    class_specs=(
        ClassSpec("Desktop", "1", "a stationary computer on mains power with its own screen and cooling"),
        ClassSpec("Laptop", "2", "a portable computer that also charges a battery"),
    ),
    question=(
        "The plot shows the electricity use of one computer in a UK household, recorded in the government study "
        "Powering the Nation: one reading every 2 minutes over 24 hours, 720 values. "
        "Decide which kind of computer it was. Choose the label that fits the whole signal."
    ),
    answer_format=(
        "First reason step by step inside <think> </think>. Then give exactly one label, 'Desktop' or 'Laptop', "
        "inside <class> </class>, and nothing after it."
    ),
    # The original reads the .arff files, and theirs are the published checksums.
    reader=UcrReader("Computers", formats=("arff", "ts", "tsv", "txt")),
    plot=PlotStyle(title="Complete Signal", x_label="Timestamp", y_label="Value"),
    channels=1,
    length=720,
    rows=(250, 250),
    time_step=120.0,
    download=Download(
        url="https://www.timeseriesclassification.com/aeon-toolkit/Computers.zip",
        sha256={
            "Computers_TRAIN.arff": "97dd70331857973ec72b06fd42286a90cd700e9e884dc7a74a42bfdd5c8faa9e",
            "Computers_TEST.arff": "7b83c2757ce3293c66bf9d7698cda39dea9cf55d64dcdf5c88dc7254b200f4bb",
        },
    ),
    licence="no formal licence; the UCR/UEA archive asks for citation",
    citation="Dau et al., The UCR Time Series Archive, IEEE/CAA J. Automatica Sinica 6(6), 2019",
)
