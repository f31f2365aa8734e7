"""imagemill: retouch images in bulk."""
