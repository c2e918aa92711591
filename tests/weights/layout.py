"""Whether the texts of a drawn figure can be read: an oracle by their places in it."""

from itertools import combinations

from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

EDGE = 1  # pixel: what a rounded corner of a letter may lack


def find_overlaps(figure: Figure) -> list[str]:
    """Texts that another one or the edge of the picture cuts."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    # that of the text alone, without the line from a name to what it names
    places = {text: shrink(Text.get_window_extent(text, renderer)) for text in list_texts(figure)}
    whole = Bbox([[0, 0], figure.get_size_inches() * figure.dpi])
    cut = [f"{text.get_text()} is cut" for text, place in places.items() if not is_within(place, whole)]
    return cut + [
        f"{a.get_text()} is over {b.get_text()}" for a, b in combinations(places, 2) if places[a].overlaps(places[b])
    ]


def list_texts(figure: Figure) -> list[Text]:
    """All that is seen; an axis keeps labels of places beyond its ends, which are not drawn."""
    hidden = set()
    for axis in figure.findobj(lambda artist: isinstance(artist, Axis)):
        low, high = sorted(axis.get_view_interval())
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            if not low <= tick.get_loc() <= high:
                hidden |= {tick.label1, tick.label2}
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text() and text not in hidden]


def shrink(place: Bbox) -> Bbox:
    return Bbox([[place.x0 + EDGE, place.y0 + EDGE], [place.x1 - EDGE, place.y1 - EDGE]])


def is_within(place: Bbox, whole: Bbox) -> bool:
    return whole.x0 <= place.x0 and whole.y0 <= place.y0 and place.x1 <= whole.x1 and place.y1 <= whole.y1
