"""RCW: does a two-second clip hold the up-call of a right whale (UEA RightWhaleCalls), shown as a spectrogram.

Up-calls sweep from about 60 to 250 Hz, so frequencies up to 500 Hz are drawn, on a linear axis.
"""

from dataclasses import replace

from verl.timeseries.numeric import NumericFormat
from verl.timeseries.readers import UcrReader
from verl.timeseries.spectrogram import Spectrogram
from verl.timeseries.style import spectrogram_style
from verl.timeseries.task import ClassSpec, Download, TaskSpec

TASK = TaskSpec(
    name="rcw",
    data_source="rcw_dataset",
    class_specs=(
        # The .arff names the classes; the .ts is reported to number them.
        ClassSpec("RightWhale", "RightWhale", "an up-call: a tone that rises within about a second", also=("1",)),
        ClassSpec("NoWhale", "NoWhale", "only noise, or other sounds of the sea", also=("0",)),
    ),
    question=(
        "The plot shows two seconds of underwater sound, recorded at 2 kHz by a buoy in the North Atlantic. "
        "Decide whether it holds the call of a right whale."
    ),
    answer_format=(
        "First reason step by step inside <think> </think>. Then give exactly one label, 'RightWhale' or 'NoWhale', "
        "inside <class> </class>, and nothing after it."
    ),
    reader=UcrReader("RightWhaleCalls", formats=("arff", "ts", "tsv", "txt")),
    plot=replace(spectrogram_style(Spectrogram(rate=2000.0, high=500.0)), title="Spectrogram"),
    # 1,000 readings a second still hold the calls.
    numeric=NumericFormat(decimals=2, points=2000),
    channels=1,
    length=4000,
    # As reported by users of the archive, so other counts are a warning.
    rows=(10934, 1962),
    partial=True,
    time_step=1 / 2000,
    warnings=("clips of one recording may lie on both sides: the archive does not say which belong together",),
    download=Download(url="https://www.timeseriesclassification.com/aeon-toolkit/RightWhaleCalls.zip"),
    licence="rules of the Kaggle whale detection challenge: research use; the UEA archive asks for citation",
    citation="Bagnall et al., The UEA multivariate time series classification archive, arXiv 1811.00075, 2018",
)
