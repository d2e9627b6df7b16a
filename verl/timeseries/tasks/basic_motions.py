"""BasicMotions: four activities from a wrist-worn sensor; the files come with sktime, so it needs no download.

The plot is made for a model of a few million parameters: 32 vision tokens, no text, and fixed y ranges, because the
amplitude itself tells a standing person from a running one. Acceleration and rotation have different units and get a
panel each. Ranges and line width were chosen on the training split by how well a linear classifier reads the plot's
coarse pixels (14 px blocks, cross-validated accuracy): 0.89 here, 0.65 with ranges of 20 and 8, 0.74 when each
sample has its own scale.
"""

from verl.timeseries.readers import UcrReader
from verl.timeseries.style import Panel, PlotStyle
from verl.timeseries.task import ClassSpec, DescriptionStyle, TaskSpec

TASK = TaskSpec(
    name="basic_motions",
    data_source="basic_motions_dataset",
    class_specs=(
        ClassSpec("Standing", "Standing"),
        ClassSpec("Running", "Running"),
        ClassSpec("Walking", "Walking"),
        ClassSpec("Badminton", "Badminton"),
    ),
    question="A smart watch recorded acceleration (top) and rotation (bottom). What was the person doing?",
    answer_format=(
        "Reason in <think> </think>, then answer Standing, Running, Walking or Badminton in <class> </class>."
    ),
    reader=UcrReader("BasicMotions", bundled=True),
    plot=PlotStyle(
        width=224,
        height=112,
        line_width=1.5,
        ticks=False,
        left=2,
        right=2,
        bottom=2,
        top=2,
        gap=4,
        x_margin=0.0,
        panels=(
            Panel("acceleration", (0, 1, 2), limits=(-12.0, 12.0)),
            Panel("rotation", (3, 4, 5), limits=(-5.0, 5.0)),
        ),
        channel_names=("x", "y", "z", "x", "y", "z"),
    ),
    channels=6,
    length=100,
    rows=(40, 40),
    time_step=0.1,
    description=DescriptionStyle.SHORT,
    licence="bundled with sktime (BSD-3); the UEA archive asks for citation",
    citation="Bagnall et al., The UEA multivariate time series classification archive, arXiv 1811.00075, 2018",
)
