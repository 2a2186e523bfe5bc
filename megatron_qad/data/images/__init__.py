"""Image-text data: which images a record has, the tokens and tiles that they become, and how they are stored.

Preparation: ``image_parts`` finds the images of a record, ``image_sources`` reads their bytes, ``image_decoding``
checks them, ``tiling`` counts their tiles, ``placeholders`` turns the rendered chat into tokens, and ``image_files``
stores them. Training: ``image_rows`` packs whole documents into rows, and ``row_images`` reads the tiles of a row.
"""
