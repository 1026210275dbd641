"""Input pipeline: files -> samples -> tokens, labels and tiles -> batches of static shapes.

One chat sample, top to bottom:
    meta, sources, storage     meta files, and where their records and images come from
    conversations, video       a record -> a checked `ChatSample`
    templates, tokenizer,
    encode                     turns -> token ids and labels
    images, tiles              image files -> tiles
    processor                  all of that for one model, inference included
    fit                        what gives way when a sample is too long

Many samples:
    record_places,
    opening_sources            where the records of large files lie; sources of a meta file
    index, index_parts, table  the shape of every sample, known without decoding a pixel
    buckets, packing,
    plan, order                which samples form which step
    image_fetcher              images behind URLs, asked for ahead
    reader, batch, faults      a planned sample -> a row, rows -> a batch, bad samples
    pipeline, read_ahead       `Loader`: the steps of a run, resumable

Nothing in this package imports jax (grain, in read_ahead.py, does so without touching a device), so
that loader worker processes stay light.

Dims: B rows, S token slots, T tile slots, N image tokens per tile.
"""
