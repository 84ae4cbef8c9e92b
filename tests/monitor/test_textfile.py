"""`python -m sutrain.monitor.textfile`: what a user gets wrong. (test_cluster_monitoring.py has the server.)"""

from sutrain.monitor.textfile import main


def test_a_folder_is_refused_with_the_file_in_it(tmp_path, capsys):
    assert main([str(tmp_path), "--port", "0"]) == 2
    assert (
        capsys.readouterr().err == f"error: {tmp_path} is a folder; give the file, {tmp_path}/metrics.prom\n"
    )
