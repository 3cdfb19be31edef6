"""What the command line offers, by name: without importing what measures it, since torch alone takes seconds."""

TABLES = ("1", "2", "3", "4", "6", "eq15", "memory")
"""Tables of :func:`hatnet_analysis.paper.table_rows`."""

SECTIONS = ("tables", "complexity", "compare", "attention")
"""Sections of the page of :func:`hatnet_analysis.report.write_report`."""

SIZES = (224, 320, 448, 640, 896, 1280, 2048)
"""Sides of the images of :func:`hatnet_analysis.growth.growth`, in pixels."""

MAX_SIZE = 2**16
"""Largest height and width of an image in pixels; far beyond, the number of values is no longer an int64."""
