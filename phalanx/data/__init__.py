"""Data sets: file formats, ingestion, chunks, preprocessing, model files and prediction.

``manifest`` and ``model_files`` need nothing but the standard library, so that services which only
pass manifests on stay light. Everything that touches arrays lives in the other modules; import
those by name.
"""
