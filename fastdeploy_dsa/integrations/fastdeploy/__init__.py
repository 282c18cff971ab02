"""The plug-in for FastDeploy: see docs/serving_with_fastdeploy.md.

`plugin` holds the entry points and imports nothing of FastDeploy until FastDeploy calls them. Modules that subclass
FastDeploy's classes are imported by those calls alone.
"""
