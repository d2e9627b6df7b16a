"""Further UCR / UEA problems whose files come with sktime: small real sets for trials and tests.

Each is one row of the table. Class names are those of the files' own headers; where a header gives only numbers, the
classes are named by what it says of them.
"""

from verl.timeseries.readers import UcrReader
from verl.timeseries.style import PlotStyle
from verl.timeseries.task import ClassSpec, DescriptionStyle, TaskSpec

SMALL = PlotStyle(
    width=224, height=112, line_width=1.2, ticks=False, left=2, right=2, bottom=2, top=2, x_margin=0.0, y_margin=0.05
)


def _task(
    name: str,
    problem: str,
    classes: dict[str, str],
    question: str,
    *,
    rows: tuple[int, int],
    length: int | None,
    channels: int = 1,
    time_step: float | None = None,
) -> TaskSpec:
    names = list(classes.values())
    return TaskSpec(
        name=name,
        data_source=f"{name}_dataset",
        class_specs=tuple(ClassSpec(name, label) for label, name in classes.items()),
        question=question,
        answer_format=(
            f"Reason in <think> </think>, then answer {', '.join(names[:-1])} or {names[-1]} in <class> </class>."
        ),
        reader=UcrReader(problem, bundled=True),
        plot=SMALL,
        channels=channels,
        length=length,
        rows=rows,
        time_step=time_step,
        description=DescriptionStyle.SHORT,
        licence="bundled with sktime (BSD-3); the UCR/UEA archive asks for citation",
        citation="Dau et al., The UCR Time Series Archive, IEEE/CAA J. Automatica Sinica 6(6), 2019",
    )


ACS_F1 = ("Phone", "Coffee", "Computer", "Fridge", "HiFi", "Lamp", "Laptop", "Microwave", "Printer", "Television")
PLAID = ("AirCon", "Lamp", "Fan", "Fridge", "Hairdryer", "Heater", "Bulb", "Laptop", "Microwave", "Vacuum", "Washer")
LEAVES = ("Circinatum", "Glabrum", "Macrophyllum", "Negundo", "Garryana", "Kelloggii")
SPEAKERS = ("One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")

TASKS = (
    _task(
        "acsf1",
        "ACSF1",
        {str(i): name for i, name in enumerate(ACS_F1)},
        "The plot shows the power draw of a home appliance. Which appliance?",
        rows=(100, 100),
        length=1460,
    ),
    _task(
        "arrow_head",
        "ArrowHead",
        {"0": "Avonlea", "1": "Clovis", "2": "Mix"},
        "The plot is the outline of an arrowhead, as angle along its edge. Which type?",
        rows=(36, 175),
        length=251,
    ),
    _task(
        "gun_point",
        "GunPoint",
        {"1": "Gun", "2": "Point"},
        "The plot is the x position of a hand. Did the person draw a gun or only point?",
        rows=(50, 150),
        length=150,
    ),
    _task(
        "italy_power",
        "ItalyPowerDemand",
        {"1": "Winter", "2": "Summer"},
        "The plot shows one day of electricity demand in Italy. Which half of the year?",
        rows=(67, 1029),
        length=24,
        time_step=3600.0,
    ),
    _task(
        "japanese_vowels",
        "JapaneseVowels",
        {str(i): name for i, name in enumerate(SPEAKERS, start=1)},
        "The plot shows the 12 coefficients of a spoken vowel pair. Which speaker?",
        rows=(270, 370),
        length=None,
        channels=12,
    ),
    _task(
        "osu_leaf",
        "OSULeaf",
        {str(i): name for i, name in enumerate(LEAVES, start=1)},
        "The plot is the outline of a leaf. Which species?",
        rows=(200, 242),
        length=427,
    ),
    _task(
        "plaid",
        "PLAID",
        {str(i): name for i, name in enumerate(PLAID)},
        "The plot shows the current drawn by a home appliance. Which appliance?",
        rows=(537, 537),
        length=None,
    ),
)
