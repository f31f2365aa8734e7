"""Services that the tests start themselves: Redis, an S3 server and a web server of images."""
