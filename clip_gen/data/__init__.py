"""Pictures from anywhere, safely: archives and folders read as streams, any common kind of picture decoded to sRGB."""
