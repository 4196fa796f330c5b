"""What became of a run: read its directory, compare runs, and tell it as a page, text or JSON.

    read      a run directory as columns, whatever it lacks
    facts     the figures of one run
    compare   what was asked differently, and where two trajectories part
    figures   the charts, each with its finding in words and its numbers
    page      one HTML file that needs nothing else
    words     Markdown

Nothing here trains or needs torch; only `figures` and `page` need the extra `report`.
"""
