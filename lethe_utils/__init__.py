import logging

# Before anything imports bitsandbytes: it warns of an optional kernel that it does not find.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
