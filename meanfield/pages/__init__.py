"""How a page is written: pictures, HTML and words; knows no study."""
