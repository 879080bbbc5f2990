"""One row for each Hugging Face family, in files of similar ones; `table.py` lists them."""
