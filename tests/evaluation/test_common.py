import pytest
from mmseg.registry import METRICS

import diffseg  # noqa: F401  registers the metrics


@pytest.mark.parametrize(
    ('kind', 'what'),
    [
        ('DAVISMetric', 'video'),
        ('JHMDBMetric', 'video'),
        ('ScarceIoUMetric', 'picture'),
        ('PCKMetric', 'pair'),
        ('HomographyMetric', 'pair'),
    ],
)
def test_an_empty_data_set_is_an_error_that_says_so(kind, what):
    metric = METRICS.build({'type': kind})
    metric.dataset_meta = {'classes': ('a', 'b')}
    with pytest.raises(ValueError, match=f'there is no {what} to evaluate: the test data set is empty; look at data_'):
        metric.compute_metrics([])
