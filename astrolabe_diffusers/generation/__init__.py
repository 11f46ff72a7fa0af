"""Many videos to a folder: jobs -> batches of every process -> MP4 files as they are generated -> a manifest."""
