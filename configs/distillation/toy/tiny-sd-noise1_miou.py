# one draw of noise
_base_ = './_miou.py'
