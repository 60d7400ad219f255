_base_ = './_base_.py'
