"""One image, one prefill: what runs a decoder in chunks and branches."""
