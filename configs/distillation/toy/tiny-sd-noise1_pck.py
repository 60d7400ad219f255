# one draw of noise
_base_ = './_pck.py'
