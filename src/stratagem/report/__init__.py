"""Reports: line charts, tables and image grids in one self-contained HTML page."""
