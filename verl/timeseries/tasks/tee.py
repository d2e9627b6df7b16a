"""TEE: which lightning event, from its radio power seen by a satellite (UCR Lightning7, FORTE)."""

from verl.timeseries.readers import UcrReader
from verl.timeseries.style import PlotStyle
from verl.timeseries.task import ClassSpec, Download, TaskSpec

TASK = TaskSpec(
    name="tee",
    data_source="lightning_dataset",
    class_specs=(
        ClassSpec("CG Positive", "0", "a sharp turn-on of radiation, then some hundred microseconds of noise"),
        ClassSpec("IR Negative", "1", "a slow ramp up to a spike, then an exponential decline"),
        ClassSpec("Subsequent Return Stroke", "2", "a later negative stroke, after an initial one"),
        ClassSpec("Impulsive", "3", "one sudden peak"),
        ClassSpec("Impulsive Pair", "4", "two sudden peaks close together"),
        ClassSpec("Gradual Intra-Cloud", "5", "power that grows more gradually than an impulsive event"),
        ClassSpec("Off-record", "6", "an event that the window does not hold in full"),
    ),
    question=(
        "The plot shows the radio power of one lightning event, recorded by the satellite FORTE over 800 microseconds, "
        "scaled to mean 0 and deviation 1. Use when and how the power rises and falls to decide which kind of event "
        "it is."
    ),
    answer_format=(
        "First reason step by step inside <think> </think>. Then give exactly one label of this list inside "
        "<class> </class>, and nothing after it."
    ),
    reader=UcrReader("Lightning7", formats=("tsv", "arff", "ts", "txt")),
    plot=PlotStyle(title="Lightning Event", x_label="Timestamp", y_label="Power (normalised)", line_width=1.5),
    channels=1,
    length=319,
    rows=(70, 73),
    time_step=800e-6 / 319,
    warnings=("73 test rows: one row is 1.4 points of accuracy, the standard error is above 5 points",),
    download=Download(url="https://www.timeseriesclassification.com/aeon-toolkit/Lightning7.zip"),
    licence="no formal licence; the UCR/UEA archive asks for citation",
    citation=(
        "Dau et al., The UCR Time Series Archive, IEEE/CAA J. Automatica Sinica 6(6), 2019; Eads et al., Genetic "
        "algorithms and support vector machines for time series classification, Proc. SPIE 4787, 2002"
    ),
)
