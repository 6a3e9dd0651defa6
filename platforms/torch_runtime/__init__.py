"""What the torch platforms share, written against torch's device-neutral API. Not a platform."""
